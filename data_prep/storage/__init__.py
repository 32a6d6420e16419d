"""Where files lie, on a disk or in an object store, by the same few calls.

Read in this order:

    uris.py       kinds of places: paths, stores, the web; how they are shown; StorageError
    location.py   one file of any of them, opened for reading
    web.py        files of the web, https:// and hf://: read, listed, never written
    http_file.py  a file behind an address, read to the exact byte over a network that fails
    http_request.py  one question: redirects, statuses, retries
    folder.py     a folder by relative names: read, write whole, list, lock; the local one
    lease.py      the lock of a folder in an object store, where nothing locks files
    store.py      the folder in an object store, and `open_folder`, which chooses
    transfer.py   a file of one folder as a file of another: linked, copied or streamed
    cache.py      a store's large file on this machine's disk, one copy for all its processes
"""
