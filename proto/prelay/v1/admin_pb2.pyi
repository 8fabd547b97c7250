from prelay.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "address", "proof")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: _worker_pb2.Role
    address: str
    proof: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[_worker_pb2.Role, str]] = ..., address: _Optional[str] = ..., proof: _Optional[str] = ...) -> None: ...

class RegisterWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "comes_back")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMES_BACK_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    comes_back: bool
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., comes_back: _Optional[bool] = ...) -> None: ...

class RemoveWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("live_requests",)
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    live_requests: int
    def __init__(self, live_requests: _Optional[int] = ...) -> None: ...

class SetControllerRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class SetControllerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("workers", "gated_requests", "live_requests", "outcomes", "policy", "classes", "ttft", "tpot", "tokens", "uptime_s", "controller")
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ClassesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ClassOutcomes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ClassOutcomes, _Mapping]] = ...) -> None: ...
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GATED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    gated_requests: int
    live_requests: int
    outcomes: _containers.ScalarMap[str, int]
    policy: str
    classes: _containers.MessageMap[str, ClassOutcomes]
    ttft: LatencyQuantiles
    tpot: LatencyQuantiles
    tokens: int
    uptime_s: float
    controller: str
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., gated_requests: _Optional[int] = ..., live_requests: _Optional[int] = ..., outcomes: _Optional[_Mapping[str, int]] = ..., policy: _Optional[str] = ..., classes: _Optional[_Mapping[str, ClassOutcomes]] = ..., ttft: _Optional[_Union[LatencyQuantiles, _Mapping]] = ..., tpot: _Optional[_Union[LatencyQuantiles, _Mapping]] = ..., tokens: _Optional[int] = ..., uptime_s: _Optional[float] = ..., controller: _Optional[str] = ...) -> None: ...

class ClassOutcomes(_message.Message):
    __slots__ = ("outcomes", "ttft_limit_s", "tpot_limit_s")
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    TTFT_LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.ScalarMap[str, int]
    ttft_limit_s: float
    tpot_limit_s: float
    def __init__(self, outcomes: _Optional[_Mapping[str, int]] = ..., ttft_limit_s: _Optional[float] = ..., tpot_limit_s: _Optional[float] = ...) -> None: ...

class LatencyQuantiles(_message.Message):
    __slots__ = ("p50_s", "p90_s", "p99_s")
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    p50_s: float
    p90_s: float
    p99_s: float
    def __init__(self, p50_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("info", "up", "load", "suspected", "live_requests", "draining")
    INFO_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SUSPECTED_FIELD_NUMBER: _ClassVar[int]
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    info: _worker_pb2.WorkerInfo
    up: bool
    load: _worker_pb2.Snapshot
    suspected: bool
    live_requests: int
    draining: bool
    def __init__(self, info: _Optional[_Union[_worker_pb2.WorkerInfo, _Mapping]] = ..., up: _Optional[bool] = ..., load: _Optional[_Union[_worker_pb2.Snapshot, _Mapping]] = ..., suspected: _Optional[bool] = ..., live_requests: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class GetWorkloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkloadResponse(_message.Message):
    __slots__ = ("seconds", "rate", "hit_share", "shapes", "drifts", "latest_rate", "num_latest")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    HIT_SHARE_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    DRIFTS_FIELD_NUMBER: _ClassVar[int]
    LATEST_RATE_FIELD_NUMBER: _ClassVar[int]
    NUM_LATEST_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    rate: float
    hit_share: float
    shapes: _containers.RepeatedCompositeFieldContainer[RequestShape]
    drifts: _containers.RepeatedCompositeFieldContainer[Drift]
    latest_rate: float
    num_latest: int
    def __init__(self, seconds: _Optional[float] = ..., rate: _Optional[float] = ..., hit_share: _Optional[float] = ..., shapes: _Optional[_Iterable[_Union[RequestShape, _Mapping]]] = ..., drifts: _Optional[_Iterable[_Union[Drift, _Mapping]]] = ..., latest_rate: _Optional[float] = ..., num_latest: _Optional[int] = ...) -> None: ...

class RequestShape(_message.Message):
    __slots__ = ("prompt_tokens", "answer_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    answer_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., answer_tokens: _Optional[int] = ...) -> None: ...

class Drift(_message.Message):
    __slots__ = ("trait", "before", "now")
    TRAIT_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    trait: str
    before: float
    now: float
    def __init__(self, trait: _Optional[str] = ..., before: _Optional[float] = ..., now: _Optional[float] = ...) -> None: ...
