"""Model folder + prompt → video: a service on Ray, and the same video in one process without it.

A request comes in by HTTP, waits in a queue, is made by two half-sessions in two processes, and
leaves an mp4 and its lossless frames. To read in this order:

    config.py       settings: what is admitted, how videos are sampled, what is taken
    errors.py       every refusal and failure that a client can see, as one tree
    requests.py     what a client may ask for, and whether the model can make it
    messages.py     what passes between the replicas of one video
    loading.py      a model folder in memory, or as much of it as one deployment needs
    session.py      prompt → latents → frames: the two half-sessions, and both in one process
    job_store.py    the durable list of videos asked for, and their folders
    dispatcher.py   queue, deadlines, cancelling, results on disk
    api.py          HTTP routes over the dispatcher
    replica.py      a replica's one compute thread, and the credit of a session
    start.py        ports and readiness
    deployments/    the three deployments on Ray Serve: Api, DeepBlock, FrameDecoder
    on_ray.py       starts and stops them

The deployments are the parts of the service; each runs as one or more replicas, which are
processes. Files above `deployments/` know nothing of Ray.
"""
