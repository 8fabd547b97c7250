from prelay.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SetRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role", "drain_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _worker_pb2.Role
    drain_s: float
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.Role, str]] = ..., drain_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id", "drain_s", "undo")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    drain_s: float
    undo: bool
    def __init__(self, worker_id: _Optional[str] = ..., drain_s: _Optional[float] = ..., undo: _Optional[bool] = ...) -> None: ...

class SetPoolsRequest(_message.Message):
    __slots__ = ("pools", "drain_s", "dry_run")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolSize]
    drain_s: float
    dry_run: bool
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolSize, _Mapping]]] = ..., drain_s: _Optional[float] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("worker_ids", "drain_s", "dry_run")
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    drain_s: float
    dry_run: bool
    def __init__(self, worker_ids: _Optional[_Iterable[str]] = ..., drain_s: _Optional[float] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class PoolSize(_message.Message):
    __slots__ = ("role", "replicas")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.Role
    replicas: int
    def __init__(self, role: _Optional[_Union[_worker_pb2.Role, str]] = ..., replicas: _Optional[int] = ...) -> None: ...

class ChangeProgress(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...
