"""What real models ask for (the table of the design): one record per kernel variant."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
    """One attention layer. `window` keys before a query, itself not counted; None: all."""

    heads: tuple[int, int]  # (N, K)
    dims: tuple[int, int]  # (H, Hv)
    window: int | None
    softcap: float | None = None
    learned: bool = False


MODELS = {
    "mistral_7b": Model((32, 8), (128, 128), 4095),
    "mistral_7b_global": Model((32, 8), (128, 128), None),
    "phi3_mini": Model((32, 32), (96, 96), 2046),
    "gemma2_9b": Model((16, 8), (256, 256), 4095, softcap=50.0),
    "gemma3_4b": Model((8, 4), (256, 256), 1023),
    "gemma3_27b": Model((32, 16), (128, 128), 1023),
    "gemma3_270m": Model((4, 1), (256, 256), 511),
    "gpt_oss": Model((64, 8), (64, 64), 127, learned=True),
    "mimo_v2_flash": Model((64, 8), (192, 128), 128, learned=True),
    "olmo3_7b": Model((32, 32), (128, 128), 4095),
    "olmo3_32b": Model((40, 8), (128, 128), 4095),
    "command_a": Model((96, 8), (128, 128), 4095),
}
