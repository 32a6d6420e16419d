"""The networks and their mathematics, in torch alone: STARFlow-V from its equations.

Nothing here knows of Ray, logging, the environment, or files other than weights and their settings.
The paper is arXiv 2511.20462; `docs/design.md` is the contract: equations, schedules, formats.
Importing this package loads nothing.

Read it in this order. Numbers, which load without torch:

- `config`: `FlowConfig`, the structure of a model, and the presets of the released ones.
- `codec_factors`, `aspects`: how much smaller latents are than video; sizes of buckets.
- `prompt`: what a model reads for a clip, by the one function that writes it.
- `sample_spec`, `counters`: what to sample and how; what it took.
- `released_yaml`: the released configuration format.

The model, from data to noise:

- `tokens`: latents to tokens and back, and the one convention for shapes.
- `rope`, `attention`: rotary positions; transformer layers and the three ways they attend.
- `block`: one affine autoregressive block.
- `denoiser`: the causal network that turns a noisy latent clean in one step.
- `flow`: the deep-shallow flow, its log-density, and the model that pairs it with its denoiser.
- `likelihood`: log-densities by video, frame and token, in bounded memory.
- `score`: ∇ log p, and denoising by it.

From noise to data:

- `guidance`: two Gaussians in, one out.
- `inverse`: one block solved sequentially or by Jacobi.
- `sliding`: one block solved by the longest converged prefix, the default.
- `packed_weights`: a pass over new places made fast on CPUs.
- `shallow`: the shallow stack undone.
- `sampling`: `DeepStream`, `FrameStream` and `sample`, from seeds to latents.
- `stream_batch`: several videos in shared passes.
- `certificate`: how exact a sample is.

What stands around the flow, and what lies on disk:

- `text`: text encoders.
- `latent_convention`, `codec`: the frozen VAE between frames and latents.
- `tensor_files`: named tensors in safetensors files.
- `model_folder`: model folders, written whole and loaded file by file.
- `released_checkpoint`: released `.pth` files, mapped rather than read.
"""
