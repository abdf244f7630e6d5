"""A source by its spec, such as 'embedded' or 'folder:/data/imagenet'."""

from __future__ import annotations

from ar_jax.data.arrays import SyntheticSource
from ar_jax.data.captions import CaptionedSource
from ar_jax.data.codes import CodesSource
from ar_jax.data.embedded import open_embedded
from ar_jax.data.folder import DEFAULT_HOLDOUT, FolderSource
from ar_jax.data.idx import open_idx
from ar_jax.data.source import SkipUnreadable, Source, split_name

SPECS = ("embedded", "synthetic", "idx:DIR", "folder:DIR", "arrayrecord:DIR", "codes:DIR")


def open_source(
    spec: str,
    split: str,
    *,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    on_error: str = "raise",
    holdout: float = DEFAULT_HOLDOUT,
    captions: str = "",
) -> Source:
    """Opens a source.

    Args:
        spec: one of `SPECS`.
        split: 'train' or 'test' ('val' means 'test').
        num_classes: what the caller expects; must equal what the source knows. For idx files,
            which do not say, an upper bound of the labels. None takes what the source has.
        channels: 1 or 3 converts every image by the rule in `ar_jax.data.decode`; None keeps the
            source's own, which must then be the same for all. Of codes it is only checked.
        image_size: side of synthetic images; of other sources it is not used here, because crops
            come later.
        on_error: 'raise' at the first unreadable item, or 'skip' it (see `SkipUnreadable`).
        holdout: fraction held out where a folder has no split of its own.
        captions: directory of the features of the items' captions, see `CaptionedSource`; empty:
            items have none.

    Raises:
        ValueError: names the spec, file or field at fault, and what would be right.
    """
    split = split_name(spec, split)
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error={on_error!r} is not known; use 'raise' or 'skip'")
    for field, value in (("num_classes", num_classes), ("channels", channels)):
        if value is not None and value < 1:
            raise ValueError(f"data.{field}={value} must be at least 1")
    source = _open(
        spec,
        split,
        num_classes=num_classes,
        channels=channels,
        image_size=image_size,
        holdout=holdout,
    )
    if num_classes is not None and num_classes != source.num_classes:
        raise ValueError(
            f"data.num_classes={num_classes}, but {source.name} has {source.num_classes} classes; "
            f"set data.num_classes={source.num_classes}"
        )
    if channels is not None and channels != source.channels:
        raise ValueError(
            f"data.channels={channels}, but {source.name} was made from images of "
            f"{source.channels} channel(s); set data.channels={source.channels}"
        )
    source = CaptionedSource(source, captions, split) if captions else source
    return SkipUnreadable(source) if on_error == "skip" else source


def _open(
    spec: str,
    split: str,
    *,
    num_classes: int | None,
    channels: int | None,
    image_size: int | None,
    holdout: float,
) -> Source:
    kind, colon, directory = spec.partition(":")
    if spec == "embedded":
        return open_embedded(split, channels=channels)
    if spec == "synthetic":
        if image_size is None or image_size < 1:
            raise ValueError(
                f"data.image_size={image_size}: a synthetic source needs the side of its images, "
                "such as 256"
            )
        return SyntheticSource(
            split, image_size=image_size, channels=channels, num_classes=num_classes
        )
    if colon and not directory:
        raise ValueError(f"data.source={spec!r} names no directory; write {kind}:DIR")
    if kind == "idx" and colon:
        return open_idx(directory, split, num_classes=num_classes, channels=channels)
    if kind == "folder" and colon:
        return FolderSource(directory, split, channels=channels, holdout=holdout)
    if kind == "codes" and colon:
        return CodesSource(directory, split)
    if kind == "arrayrecord" and colon:
        # The array_record extension is loaded only by those who use it.
        from ar_jax.data.records import RecordSource

        return RecordSource(directory, split, channels=channels)
    raise ValueError(f"data.source={spec!r} is not known; use one of {', '.join(SPECS)}")
