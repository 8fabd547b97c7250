"""What can go wrong in a hand-off.

TransferError
+-- HandoffError         this worker's own code broke the protocol (a defect, never a peer's fault)
+-- StaleBlocksError     the blocks were recycled while, or before, they were copied: the copy is worthless
+-- DigestError          the copied bytes are not those that were offered
+-- SegmentError         a peer's shared memory cannot be opened, or is not the one that was announced
+-- BackendMissingError  a backend that the configuration names cannot be used here
+-- PeerMismatchError    the two workers do not fit together; the message names the field
+-- PeerUnreachableError no link to the peer, or another life of it answers
"""

from __future__ import annotations


class TransferError(Exception):
    """Root of this package's errors."""


class HandoffError(TransferError):
    """A call on a hand-off state machine that its owner must never make."""


class StaleBlocksError(TransferError):
    """The source blocks' generations differ from those offered: the copy must be thrown away."""


class DigestError(TransferError):
    """What was copied differs from what was offered, though nobody recycled it."""


class SegmentError(TransferError):
    """A shared memory segment that cannot be opened or is not what its announcement says."""


class BackendMissingError(TransferError):
    """A backend needs a package, a device or memory that is not here."""


class PeerMismatchError(TransferError):
    """The handshake failed: protocol version, model, layout or backend differ between the two workers."""


class PeerUnreachableError(TransferError):
    """The peer did not answer, ended the link, or is not the life of the worker that was asked for."""
