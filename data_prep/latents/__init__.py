"""What comes out: latents and captions on disk, and everything that reads them.

Read in this order:

    records.py     what is stored: schemas, the record, `dataset.json`; writing and reading rows
    ids.py         ids as a sequence of texts that are made when they are asked for
    index_file.py  the index's file: its columns, and how they are made from the manifests
    index.py       where the record of a key lies, found without a search
    dataset.py     random access to records and batches: what training reads
    duplicates.py  near-duplicates: hashes of looks, and the mask of all but the first
    encode.py      the encoding stage: frames → moments
    merge.py       datasets of one recipe as one dataset
    export.py      a dataset as WebDataset tars, for other trainers
    inspection.py  figures and pictures of a dataset
"""
