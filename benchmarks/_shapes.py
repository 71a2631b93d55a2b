"""Linear layers of known models, (out_features, in_features): the shapes that benchmarks choose from, by name."""

SHAPES = {
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M gate_proj": (1536, 576),
    "SmolLM2-135M down_proj": (576, 1536),
    "Llama-3-8B q_proj": (4096, 4096),
    "Llama-3-8B k_proj": (1024, 4096),
    "Llama-3-8B gate_proj": (14336, 4096),
    "Llama-3-8B down_proj": (4096, 14336),
    "Qwen2.5-7B q_proj": (3584, 3584),
    "Qwen2.5-7B gate_proj": (18944, 3584),
    "Llama-3-70B q_proj": (8192, 8192),
    "Llama-3-70B gate_proj": (28672, 8192),
    "Llama-3-70B down_proj": (8192, 28672),
}
