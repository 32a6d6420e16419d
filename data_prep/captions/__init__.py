"""Who says what is seen: the synthetic captions, one clip at a time.

Read in this order:

    captioner.py  the interface: clips in, one caption or one named failure a clip out
    config.py     its settings, and what of them decides a caption
    stage.py      the captioning stage, and when many failures in a row stop a run
    choose.py     the back end of a recipe
    fitness.py    which samples a back end is fit to caption
    none.py       back end: no synthetic captions
    measured.py   back end: colours, shapes and motion read from the pixels, no weights
    vlm.py        back end: a vision-language model of transformers
    http.py       back end: any OpenAI-compatible chat endpoint
    vllm.py       back end: the model of `vlm` on vLLM; settings, and rows in and out
    on_ray.py     the same as a stage of Ray Data's own
"""
