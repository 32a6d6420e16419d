"""The order of things: which stage follows which, and what the commands do.

Read in this order.

    stages.py           READ FIRST: the whole story, the demo at the top, then its stages
    recipes.py          all settings of a run in one YAML file, and overrides
    recipes/            the recipes that ship
    cluster.py          where Ray comes from: one of our own, or a cluster; Ray jobs
    cli/                the command line: each command is a few lines over what follows

What the commands do, beside the stages:

    make_video.py       `flowreel sample`: one video in this process
    video_likelihood.py `flowreel likelihood`: how likely a model finds a video
    run_service.py      `flowreel serve`: a service from start to stop
    import_released.py  `flowreel import-weights`: a released checkpoint → a model folder
    dataset_page.py     `flowreel inspect`: a dataset's figures and pictures
    doctor.py           `flowreel doctor`: what this machine lacks
    settings.py         `flowreel settings`: every setting, and `docs/settings.md`
    schema_fields.py    how a schema is read for that

What the stages use:

    demo_figures.py     what the demo measures of its model
    client.py           a client of the service, as any user would write one
    report.py           the demo's page: contact sheet, loss curve, timeline
    tables.py           outcomes as tables and closing lines
    console.py          words, progress and JSON: what is shown, and where
    assets/             templates of the two pages, and the tiny codec
"""
