"""The verb ``export``."""

from integrations.tiny import tiny_model

import peft_quantlayers as pql
from peft_quantlayers.cli import main


def saved(folder):
    pql.quantize_model(tiny_model(), pql.HQQConfig(group_size=32), progress=False).save_pretrained(folder)
    return str(folder)


def test_it_writes_the_model_and_prints_the_serving_command(tmp_path, capsys):
    source, out = saved(tmp_path / "saved"), str(tmp_path / "out")
    assert main(["export", source, out, "--format", "mlx", "--dtype", "float32"]) == 0
    assert f"mlx_lm.server --model {out}" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_refusal_is_a_sentence_and_exit_code_1(tmp_path, capsys):
    source, out = saved(tmp_path / "saved"), str(tmp_path / "out")
    assert main(["export", source, out, "--format", "awq"]) == 1
    said = capsys.readouterr().err
    assert "peft-quantlayers export: awq cannot hold this model" in said
    assert "approximate='adapter'" in said
    assert main(["export", source, out, "--format", "ggfu"]) == 1
    assert "did you mean 'gguf'" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), out, "--format", "mlx"]) == 1
    assert not (tmp_path / "out").exists()
