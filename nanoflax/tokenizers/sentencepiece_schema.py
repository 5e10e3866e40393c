"""The fields of a SentencePiece model that nanoflax reads.

The package sentencepiece has the whole schema, but generated for one version of protobuf, which other packages (Apache
Beam) do not allow.
"""

import functools
from typing import Any

ENUMS = {  # name: its values, from 1
    "TrainerSpec.ModelType": ("UNIGRAM", "BPE", "WORD", "CHAR"),
    "Piece.Type": ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"),
}
FIELDS = {  # message: (name, number, type, default)
    "Piece": (("piece", 1, "string", ""), ("score", 2, "float", "0"), ("type", 3, "Piece.Type", "NORMAL")),
    "TrainerSpec": (
        ("model_type", 3, "TrainerSpec.ModelType", "UNIGRAM"),
        ("treat_whitespace_as_suffix", 24, "bool", "false"),
        ("byte_fallback", 35, "bool", "false"),
        ("unk_id", 40, "int32", "0"),
        ("bos_id", 41, "int32", "1"),
        ("eos_id", 42, "int32", "2"),
        ("pad_id", 43, "int32", "-1"),
    ),
    "NormalizerSpec": (
        ("precompiled_charsmap", 2, "bytes", ""),
        ("add_dummy_prefix", 3, "bool", "true"),
        ("remove_extra_whitespaces", 4, "bool", "true"),
    ),
    "ModelProto": (
        ("pieces", 1, "Piece", None),  # a list
        ("trainer_spec", 2, "TrainerSpec", None),
        ("normalizer_spec", 3, "NormalizerSpec", None),
    ),
}


@functools.cache
def model_class() -> Any:
    """The message class of a model, with the fields of FIELDS."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    package = "nanoflax.sentencepiece"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    kinds: Any = descriptor_pb2.FieldDescriptorProto
    for message, fields in FIELDS.items():
        made = file.message_type.add(name=message)
        for name, values in ENUMS.items():
            if name.startswith(f"{message}."):
                enum = made.enum_type.add(name=name.partition(".")[2])
                for i, value in enumerate(values, 1):
                    enum.value.add(name=value, number=i)
        for name, number, kind, default in fields:
            field = made.field.add(name=name, number=number, default_value=default)
            field.label = kinds.LABEL_REPEATED if name == "pieces" else kinds.LABEL_OPTIONAL
            if kind in FIELDS or kind in ENUMS:
                field.type = kinds.TYPE_ENUM if kind in ENUMS else kinds.TYPE_MESSAGE
                field.type_name = f".{package}.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # not the pool of sentencepiece's own schema
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.ModelProto"))
