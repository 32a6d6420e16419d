"""The three deployments of the service on Ray Serve.

    on_ray.py    Api, DeepBlock and FrameDecoder: what one replica of each does

`serving.on_ray` binds them together and starts them.
"""
