"""Text once: every prompt that training reads, encoded before training and kept beside captions.

    ROOT/texts/settings.json     which encoder made the vectors, and which prompts there are
    ROOT/texts/SHARD.parquet     a row per distinct prompt of a shard
    ROOT/texts/index.arrow       where the vectors of a prompt lie; made anew when a shard changed

A shard's file stands in its manifest like its captions, so that it is resumed, merged and removed
with them. Read in this order:

    records.py   what is stored: settings, rows, the version
    write.py     a shard's captions become its file; which shards are left
    run.py       a run around that, in one process; what came of it
    index.py     where the vectors of a prompt lie
    read.py      a text encoder that reads what another one made
    on_ray.py    the same run with encoders on the workers of a cluster
"""
