from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Handshake(_message.Message):
    __slots__ = ("protocol_version", "worker_id", "epoch", "model_fingerprint", "layout", "backends", "protocol_minor", "digest_share", "host_id", "ipc", "torchdist", "nixl")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_FIELD_NUMBER: _ClassVar[int]
    DIGEST_SHARE_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    IPC_FIELD_NUMBER: _ClassVar[int]
    TORCHDIST_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_id: str
    epoch: int
    model_fingerprint: str
    layout: KvLayout
    backends: _containers.RepeatedScalarFieldContainer[str]
    protocol_minor: int
    digest_share: float
    host_id: str
    ipc: IpcEndpoint
    torchdist: TorchDistEndpoint
    nixl: NixlEndpoint
    def __init__(self, protocol_version: _Optional[int] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., backends: _Optional[_Iterable[str]] = ..., protocol_minor: _Optional[int] = ..., digest_share: _Optional[float] = ..., host_id: _Optional[str] = ..., ipc: _Optional[_Union[IpcEndpoint, _Mapping]] = ..., torchdist: _Optional[_Union[TorchDistEndpoint, _Mapping]] = ..., nixl: _Optional[_Union[NixlEndpoint, _Mapping]] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype", "tp_size", "pp_size")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    tp_size: int
    pp_size: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., tp_size: _Optional[int] = ..., pp_size: _Optional[int] = ...) -> None: ...

class IpcEndpoint(_message.Message):
    __slots__ = ("ranks",)
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[IpcSegment]
    def __init__(self, ranks: _Optional[_Iterable[_Union[IpcSegment, _Mapping]]] = ...) -> None: ...

class IpcSegment(_message.Message):
    __slots__ = ("pid", "fd", "num_bytes", "cuda_handle", "cuda_offset")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CUDA_HANDLE_FIELD_NUMBER: _ClassVar[int]
    CUDA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    num_bytes: int
    cuda_handle: bytes
    cuda_offset: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., cuda_handle: _Optional[bytes] = ..., cuda_offset: _Optional[int] = ...) -> None: ...

class TorchDistEndpoint(_message.Message):
    __slots__ = ("host", "port", "prefix", "transport", "num_blocks")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    prefix: str
    transport: str
    num_blocks: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., prefix: _Optional[str] = ..., transport: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class NixlEndpoint(_message.Message):
    __slots__ = ("agent", "metadata", "ranks", "generations")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    metadata: bytes
    ranks: _containers.RepeatedCompositeFieldContainer[NixlRegion]
    generations: NixlRegion
    def __init__(self, agent: _Optional[str] = ..., metadata: _Optional[bytes] = ..., ranks: _Optional[_Iterable[_Union[NixlRegion, _Mapping]]] = ..., generations: _Optional[_Union[NixlRegion, _Mapping]] = ...) -> None: ...

class NixlRegion(_message.Message):
    __slots__ = ("address", "num_bytes", "memory", "device")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    address: int
    num_bytes: int
    memory: str
    device: int
    def __init__(self, address: _Optional[int] = ..., num_bytes: _Optional[int] = ..., memory: _Optional[str] = ..., device: _Optional[int] = ...) -> None: ...

class HandoffKey(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class PullerMessage(_message.Message):
    __slots__ = ("handshake", "acknowledge", "drop", "renew")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    handshake: Handshake
    acknowledge: HandoffKey
    drop: HandoffKey
    renew: Renew
    def __init__(self, handshake: _Optional[_Union[Handshake, _Mapping]] = ..., acknowledge: _Optional[_Union[HandoffKey, _Mapping]] = ..., drop: _Optional[_Union[HandoffKey, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ...) -> None: ...

class OffererMessage(_message.Message):
    __slots__ = ("handshake", "offer", "withdraw", "renew", "complete")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    handshake: Handshake
    offer: Offer
    withdraw: HandoffKey
    renew: Renew
    complete: Complete
    def __init__(self, handshake: _Optional[_Union[Handshake, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., withdraw: _Optional[_Union[HandoffKey, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("key", "start_token", "end_token", "start_layer", "end_layer", "blocks", "generations", "digests")
    KEY_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    START_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    key: HandoffKey
    start_token: int
    end_token: int
    start_layer: int
    end_layer: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[_Union[HandoffKey, _Mapping]] = ..., start_token: _Optional[int] = ..., end_token: _Optional[int] = ..., start_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("key", "num_tokens", "first_token")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    key: HandoffKey
    num_tokens: int
    first_token: int
    def __init__(self, key: _Optional[_Union[HandoffKey, _Mapping]] = ..., num_tokens: _Optional[int] = ..., first_token: _Optional[int] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[HandoffKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[HandoffKey, _Mapping]]] = ...) -> None: ...
