"""The order of things, from video shards to served video, and the command line that runs it.

Read in this order:

    stages.py             READ FIRST: the demo, then every stage that it calls
    recipes.py            one YAML file that says everything about a run
    cluster.py            a Ray of its own, or a cluster that a run is submitted to
    demo_figures.py       what a model has learnt, in numbers
    demo_beside.py        what the report shows beside the model's own videos
    watch.py              `flowreel watch`: what a run does just now
    run_samples.py        videos of a trained model at fixed seeds, for MLflow
    make_video.py         `flowreel sample`
    video_likelihood.py   `flowreel likelihood`
    run_service.py        `flowreel serve`
    evaluation/           `flowreel evaluate`
    shipped.py            the weights that ship
    import_released.py    `flowreel import-weights`
    merge_adapter.py      `flowreel merge-adapter`
    encode_texts.py       `flowreel prepare --only text`
    sample_look.py        `flowreel look`
    dataset_page.py       `flowreel inspect`
    training_plan.py      `flowreel plan`
    doctor.py             `flowreel doctor`
    settings.py           `flowreel settings` and docs/settings.md
    schema_fields.py      what a schema says of its fields
    client.py             a client of the service
    report.py             the page that a demo leaves
    tables.py             outcomes as a person reads them
    console.py            words, progress and outcomes of a command
    cli/                  the command line
"""
