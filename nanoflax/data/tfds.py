"""Data sets of TFDS, read as array_record without TensorFlow."""

import contextlib
import logging
import os
import socket
import threading
import urllib.parse
import urllib.request
from typing import Any

from nanoflax.errors import UserError


def _not_a_tfds_warning(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or "tensorflow_datasets" not in record.pathname


def open_dataset(name: str, data_dir: str = "") -> Any:
    """The builder of the prepared TFDS data set NAME[/CONFIG][:VERSION]. TensorFlow is not imported.

    data_dir: default $TFDS_DATA_DIR, or the default of TFDS. Raises: UserError if preparing the data set fails.
    """
    import absl.logging
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    hint = (
        f"prepare it once, on a machine with a network: tfds build {name} "
        f"--file_format=array_record --data_dir={directory or constants.DATA_DIR}"
    )
    # TFDS logs a warning for each folder that it searches. Real errors are exceptions.
    logger = absl.logging.get_absl_logger()
    logger.addFilter(_not_a_tfds_warning)
    try:
        builder = tfds.builder(name, data_dir=directory)
        if not builder.is_prepared():
            if not _online():
                raise UserError(f"tfds:{name} is not prepared and there is no network; {hint}")
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # TFDS raises many classes of exceptions, with long texts
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tfds:{name} is not prepared here: {message} {hint}") from error
    finally:
        logger.removeFilter(_not_a_tfds_warning)
    return builder


def _online(seconds: float = 3) -> bool:
    """Whether the server of prepared data sets, or the proxy, answers within `seconds`."""
    proxy = urllib.parse.urlsplit(urllib.request.getproxies().get("https", ""))
    address = (proxy.hostname or "storage.googleapis.com", proxy.port or 443)
    answered = threading.Event()

    def connect():  # runs in a thread, because a DNS lookup has no timeout
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def dataset_splits(builder: Any) -> dict[str, list[str]]:
    """{"train": [name], "all": [names]}; also "validation": [name] if the split validation, or else test, exists."""
    names = list(builder.info.splits)
    if "train" not in names:
        raise UserError(f"tfds:{builder.info.full_name} has no split named train, only {', '.join(names)}")
    held_out = [name for name in ("validation", "test") if name in names][:1]
    return {"train": ["train"], "all": names} | ({"validation": held_out} if held_out else {})


def dataset_examples(builder: Any, split: str) -> Any:
    """The examples of one split of a TFDS builder, with random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{builder.info.full_name} is prepared as {builder.info.file_format.value}: prepare it again with "
            "--file_format=array_record"
        ) from error
