"""What comes in: shards of samples, as a user names them and in whatever state they are.

A shard is a tar or a folder of loose files. Read in this order:

    find.py           which shards a user's words name, their names, fingerprints of change
    listing.py        what lies in a shard, member by member; ShardError
    tar_archive.py    a tar, plain or compressed, cut or damaged or hostile
    unpacking.py      the tar inside a compressed shard
    loose_files.py    a folder of loose files
    config.py         settings: suffixes of media and captions, fields of a json
    archive.py        either of the two, by its path
    samples.py        members become samples; Panda-70M's oddities; tars are written
    one_sample.py     one sample without the others; a file by itself
    on_ray.py         the shards as a data source of Ray Data
"""
