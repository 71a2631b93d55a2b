"""PEFT's own tests, run with every ``nn.Linear`` of their models replaced by a quantized layer."""
