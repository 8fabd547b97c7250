"""Everything that the engine refuses, drawn as the tree that it is. No torch here.

EngineError
├── CheckpointError          the checkpoint directory is incomplete, damaged or contradicts itself
├── UnsupportedModelError    the checkpoint is sound, but this engine does not compute that model
├── DeviceError              the device that is asked for cannot be used
├── KernelsUnavailableError  the compiled CPU kernels are asked for, and cannot be used here
├── TlsError                 certificates for TLS are missing, or cannot be used
├── TokenizerError           a text or a list of messages cannot be turned into tokens
├── InvalidStepError         a scheduled chunk that no engine could run
├── KvMemoryError            the memory there is does not hold the KV of one sequence
├── RankDiedError            a process of a worker that has several is gone, and the worker with it
├── GroupBrokenError         an operation between ranks has failed, as one of them is gone
├── OutOfBlocksError         more KV blocks wanted than are free
└── BlockAccountingError     a block was given back or shared by somebody who does not hold it
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything that `engine` raises on purpose."""


class CheckpointError(EngineError):
    """A file of the checkpoint is missing, truncated, unreadable, or does not fit the others."""


class UnsupportedModelError(EngineError):
    """The checkpoint asks for mathematics, a format or a number type that this engine does not have."""


class DeviceError(EngineError):
    """There is no such device here, or torch cannot use it; the message says why."""


class KernelsUnavailableError(EngineError):
    """The compiled CPU kernels were not built, or this CPU cannot run them; torch does the same work."""


class TlsError(EngineError):
    """The message names the file, and says what it has to be."""


class TokenizerError(EngineError):
    """The text or the messages cannot be encoded; the message is fit to be shown to whoever sent them."""


class InvalidStepError(EngineError):
    """A chunk is empty, is not covered by its block table, or names tokens or blocks that do not exist."""


class KvMemoryError(EngineError):
    """A worker's part of the memory is too small for the longest sequence."""


class RankDiedError(EngineError):
    """A rank of the worker ended or failed; the other ranks have been ended, and nothing can be computed."""


class GroupBrokenError(EngineError):
    """What one rank sees of another one's end; who is gone it does not say."""


class OutOfBlocksError(EngineError):
    """An allocation asked for more KV blocks than are free; nothing was allocated."""


class BlockAccountingError(EngineError):
    """Blocks were added to or dropped by a holder that has no reference to them; nothing was changed."""
