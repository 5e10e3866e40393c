"""Object storage: files of gs:// and s3:// by name, with retries, ranged reads and creation only if absent.

Every function takes a full name, such as "gs://bucket/a/b". fsspec reads and writes (gcsfs, s3fs); credentials and
endpoints come from the usual places (gcloud's or AWS' own files, STORAGE_EMULATOR_HOST, AWS_ENDPOINT_URL).
NANOFLAX_STORAGE_SECONDS is the deadline of an operation with its repetitions (120), NANOFLAX_LEASE_SECONDS the time
after which the lease of a silent process is taken over (60).
"""

from nanoflax.storage.filesystems import check_name, filesystem, is_remote, join
from nanoflax.storage.lease import IN_USE, Lease, in_use
from nanoflax.storage.objects import (
    delete,
    delete_all,
    download,
    exists,
    is_directory,
    list_names,
    list_sizes,
    list_versions,
    read_bytes,
    read_range,
    size,
    upload,
    write_bytes,
)
from nanoflax.storage.path import RemotePath
from nanoflax.storage.reader import open_reader
from nanoflax.storage.retries import DEADLINE_SECONDS, retried

__all__ = [
    "DEADLINE_SECONDS", "IN_USE", "Lease", "RemotePath", "check_name", "delete", "delete_all", "download", "exists",
    "filesystem", "in_use", "is_directory", "is_remote", "join", "list_names", "list_sizes", "list_versions",
    "open_reader", "read_bytes", "read_range", "retried", "size", "upload", "write_bytes"]  # fmt: skip
