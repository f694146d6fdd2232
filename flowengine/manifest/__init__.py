"""What a dataset version consists of: build, read, compare, verify.

Goal
    Two sides that hold the same files write the same manifest, each for itself, and compare 32 bytes. Where
    those differ, finding out what differs costs as much as the difference, not as the dataset.
Plan
    A Merkle tree with content-defined cuts: chunks in runs (of large objects), entries in pages, pages in
    directory nodes, the root's node and the chunking profile in the version id. Children are written before
    their parents, so building and reading stream. docs/spec/manifest.md defines the bytes.
Invariants
    - One version has one version id, and one file where runs of large objects are added in manifest order.
    - A reader yields nothing that is not covered by the version id.
    - Nothing here opens a file or a socket: bytes come and go through callables of the caller.
"""

from flowengine.manifest.block import Block, Columns, Parser, Segment, join_blocks, join_columns
from flowengine.manifest.build import MAX_DEPTH, ManifestBuilder, Page, Summary
from flowengine.manifest.compare import Change, diff
from flowengine.manifest.cut import ChunkList, ChunkListBuilder, ChunkRunCutter, PageCutter, cut_pages
from flowengine.manifest.entries import (
    DIRECTORY,
    FILE,
    FLAG_SPARSE,
    FORMAT_VERSION,
    HARDLINK,
    MAX_CHUNK_BYTES,
    MAX_EXTRA_BYTES,
    MAX_INLINE_ITEMS,
    MAX_LINK_BYTES,
    MAX_NAME_BYTES,
    MAX_PAGE_BYTES,
    MAX_PAGE_ENTRIES,
    RUN_BYTES,
    SYMLINK,
    Entry,
    Extra,
    Header,
    chunk_count,
    decode_extra,
    encode_extra,
    order_key,
)
from flowengine.manifest.read import ManifestReader

__all__ = [
    "DIRECTORY",
    "FILE",
    "FLAG_SPARSE",
    "FORMAT_VERSION",
    "HARDLINK",
    "MAX_CHUNK_BYTES",
    "MAX_DEPTH",
    "MAX_EXTRA_BYTES",
    "MAX_INLINE_ITEMS",
    "MAX_LINK_BYTES",
    "MAX_NAME_BYTES",
    "MAX_PAGE_BYTES",
    "MAX_PAGE_ENTRIES",
    "RUN_BYTES",
    "SYMLINK",
    "Block",
    "Change",
    "ChunkList",
    "ChunkListBuilder",
    "ChunkRunCutter",
    "Columns",
    "Entry",
    "Extra",
    "Header",
    "ManifestBuilder",
    "ManifestReader",
    "Page",
    "PageCutter",
    "Parser",
    "Segment",
    "Summary",
    "chunk_count",
    "cut_pages",
    "decode_extra",
    "diff",
    "encode_extra",
    "join_blocks",
    "join_columns",
    "order_key",
]
