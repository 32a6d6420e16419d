"""What is done: how an input shard becomes finished files, and how a run goes on from any point.

    OUT/staging/SHARD/DIGEST/NUMBERS.arrow   finished samples of shards that are not finished
    OUT/manifests/SHARD.json                 written last; the only truth about what is done
    OUT/manifests.parquet                    those of many shards, folded into one file

Kill a run at any moment: staged samples are taken up again, and the bytes come out the same.

Read in this order:

    manifest.py   what stands of a finished shard: the frozen type, written and read
    manifest_file.py  many manifests in one file, for large outputs
    job.py        what is to be done with a shard, and which shards are left
    staging.py    finished samples of unfinished shards
    commit.py     a shard's files and manifest, once all its samples are there
    sink.py       the last stage: staging and committing, as blocks of rows arrive
    problems.py   what is wrong with a shard itself, for reports
    reuse.py      what is taken over when a shard is made anew
    recaption.py  new captions for latents that stand
    settings.py   the settings that an output was begun with, against a run's
    locks.py      one run, and the writers of one run, at a time
    errors.py     the errors, as one tree
    on_ray.py     the sinks as actors, and the operator of Ray Data before them
"""
