"""Encoded images by content, bounded by memory: the next question about an image pays no encoder."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from flashvlm_export.errors import ConfigError
from flashvlm_export.memory import physical_bytes
from flashvlm_export.runtime.sessions.split import EncodedImage


@dataclass(frozen=True)
class CacheStats:
    """Since the cache was made: images found and not found, and what it holds now."""

    hits: int
    misses: int
    images: int
    size_bytes: int


class ImageCache:
    """Keeps the images used last, up to ``limit_bytes`` together.

    An image that alone is larger is not kept.

    Raises:
        ConfigError: if ``limit_bytes`` is negative, or more than this machine has.
    """

    def __init__(self, limit_bytes: int) -> None:
        if not 0 <= limit_bytes <= physical_bytes():
            raise ConfigError(
                "the cache of images does not fit into memory",
                received=f"{limit_bytes} bytes",
                expected=f"0 to {physical_bytes()}, which this machine has",
            )
        self.limit_bytes = limit_bytes
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()
        self._size_bytes = self._hits = self._misses = 0

    def get(self, key: str) -> EncodedImage | None:
        """Return the image of ``key``, now the one used last, or ``None``."""
        image = self._images.get(key)
        if image is None:
            self._misses += 1
            return None
        self._hits += 1
        self._images.move_to_end(key)
        return image

    def put(self, key: str, image: EncodedImage) -> None:
        """Keep ``image``, and drop those that were not used for longest until all fit."""
        self._size_bytes -= self._images.pop(key).size_bytes if key in self._images else 0
        if image.size_bytes > self.limit_bytes:
            return
        self._images[key] = image
        self._size_bytes += image.size_bytes
        while self._size_bytes > self.limit_bytes:
            _, dropped = self._images.popitem(last=False)
            self._size_bytes -= dropped.size_bytes

    def clear(self) -> None:
        """Drop every image."""
        self._images.clear()
        self._size_bytes = 0

    @property
    def stats(self) -> CacheStats:
        """Counts so far."""
        return CacheStats(self._hits, self._misses, len(self._images), self._size_bytes)
