"""The networks and their mathematics, in torch alone: STARFlow-V from its equations.

Nothing here knows of Ray, logging, the environment, or files other than weights and their settings.
The paper is arXiv 2511.20462; `docs/design.md` is the contract: equations, schedules, formats.
Importing this package loads nothing. Read it in this order.

Numbers, which load without torch:

    config.py               `FlowConfig`, the structure of a model, and the released presets
    codec_factors.py        how much smaller latents are than video
    aspects.py              aspect ratios by name, sizes of buckets
    prompt.py               what a model reads for a clip, by the one function that writes it
    text_spec.py            which text encoder a model reads
    video_spec.py           which videos a model was trained on
    sample_spec.py          what to sample and how
    counters.py             what sampling took
    released_yaml.py        the released configuration format

The model, from data to noise:

    tokens.py               latents to tokens and back, and the one convention for shapes
    rope.py                 rotary positions
    attention.py            transformer layers and the three ways they attend
    block.py                one affine autoregressive block
    denoiser.py             the causal network that turns a noisy latent clean in one step
    flow.py                 the deep-shallow flow, its log-density, the model with its denoiser
    growth.py               a model's weights in a larger one that computes the same
    likelihood.py           log-densities by video, frame and token, in bounded memory
    score.py                ∇ log p, and denoising by it

From noise to data:

    guidance.py             two Gaussians in, one out
    inverse.py              one block solved sequentially or by Jacobi
    sliding.py              one block solved by the longest converged prefix, the default
    packed_weights.py       a pass over new places made fast on CPUs
    shallow.py              the shallow stack undone
    sampling.py             `DeepStream`, `FrameStream` and `sample`, from seeds to latents
    stream_batch.py         several videos in shared passes
    certificate.py          how exact a sample is

What stands around the flow, and what lies on disk:

    device.py               which device is computed on
    text.py                 text encoders
    latent_convention.py    between codec latents and model latents
    codec_layers.py         the VAE's norms in fewer passes over memory
    codec.py                the frozen VAE between frames and latents
    tensor_files.py         named tensors in safetensors files
    adapter.py              LoRA adapters, merged into their base as it is read
    model_folder.py         model folders, written whole and loaded file by file
    released_checkpoint.py  released `.pth` files, mapped rather than read
"""
