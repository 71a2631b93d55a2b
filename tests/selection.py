"""Which tests are slow, which `make test` leaves to `make test-all`, and which `make check` runs.

Run as a script, prints the latter.

Imports nothing of ours, so that `make check` can ask before anything heavy is loaded.
"""

import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]

# What `make check` always runs: every method's contract, the files of older versions, and the public surface.
ALWAYS = ("tests/contract", "tests/formats", "tests/golden", "tests/test_public_api.py", "tests/test_selection.py")
# Tests that take more than about three seconds, mostly since they start other processes; by the start of their names.
SLOW = (
    "tests/conformance/test_conformance.py",
    "tests/exports/test_gguf.py",
    "tests/exports/test_trained_models.py",
    "tests/fuzz/test_fuzz.py",
    "tests/fuzz/test_kills.py",
    "tests/integrations/test_training.py::test_the_whole_model_compiles_without_a_graph_break",
    "tests/integrations/test_transformers.py::test_a_new_process_computes_identical_logits",
    "tests/interop/test_aqlm_package.py",
    "tests/kernels/test_native.py::test_a_wheel_is_tagged_by_what_is_in_it",
    "tests/kernels/test_triton.py",
    "tests/layers/test_fsdp2.py",
    "tests/methods/test_registry.py::test_a_file_in_the_folder_and_an_entry_point_are_found_without_an_edit_elsewhere",
    "tests/model_merge/test_trained_mixture.py",
    "tests/scales/test_training.py::test_it_compiles_without_a_graph_break",
    "tests/cli/test_bad_input.py::test_an_interrupt_at_any_file_operation_leaves_the_whole_output_or_none",
    "tests/cli/test_run.py::test_autoload_imports_the_package_in_whatever_order_a_program_imports",
    "tests/cli/test_run.py::test_autoload_in_the_environment_is_enough_and_hides_no_other_sitecustomize",
    "tests/cli/test_start.py::test_an_error_after_all_imports_is_the_only_line",
    "tests/cli/test_train_distributed.py::test_two_processes_train_the_adapter_of_one",
    "tests/integrations/test_distributed_losses.py",
    "tests/cli/test_train_killed.py::test_train_killed_at_any_moment_ends_with_the_same_files",
    "tests/cli/test_run.py::test_a_script_and_the_processes_that_it_starts_load_a_saved_model",
    "tests/integrations/test_sentinels.py::test_stock_transformers_stops_at_a_saved_model_of_any_architecture",
    "tests/streaming/test_calibrated.py::test_killed_at_any_file_operation_it_ends_with_the_same_files",
    "tests/streaming/test_peak_memory.py",
    "tests/streaming/test_quantize_checkpoint.py::test_two_processes_write_the_same_files_as_one",
    "tests/streaming/test_quantize_checkpoint.py::test_killed_at_any_file_operation_it_ends_with_the_same_files",
    "tests/streaming/test_walking_processes.py",
    "tests/test_benchmarks.py",
    "tests/test_contributing.py::test_every_pytest_command_of_a_page_selects_tests",
    "tests/test_contributing.py::test_the_method_of_the_page_passes_the_contract_from_a_package_of_its_own",
    "tests/test_distributed_page.py",
    "tests/test_floors.py::test_an_import_loads_no_kernel_compiler_and_touches_no_gpu",
)
# Left to `make test-all`: each takes ten seconds to a minute, and shows on a larger model, in more processes or on a
# second version what another test shows in seconds.
THOROUGH = (
    "tests/cli/test_run.py::test_autoload_imports_the_package_in_whatever_order_a_program_imports",
    "tests/cli/test_run.py::test_trls_commands_train_on_a_saved_model",
    "tests/cli/test_train_distributed.py::test_two_processes_train_the_adapter_of_one",
    "tests/conformance/test_conformance.py::test_pefts_own_tests_pass_on_our_layers[hqq-0.21.0]",
    "tests/exports/test_experts.py::test_gguf_of_a_mixture_with_the_tokenizer_of_gpt2s_kind[llama4]",
    "tests/exports/test_experts.py::test_gguf_of_a_mixture_with_the_tokenizer_of_gpt2s_kind[olmoe]",
    "tests/exports/test_experts.py::test_gguf_of_a_mixture_with_the_tokenizer_of_gpt2s_kind[qwen2_moe]",
    "tests/exports/test_experts.py::test_gguf_of_a_mixture_with_the_tokenizer_of_gpt2s_kind[qwen3_moe]",
    "tests/streaming/test_calibrated.py::test_stopped_after_each_block_it_ends_with_the_same_files[LlamaForCausalLM-fields1]",
    "tests/streaming/test_calibrated.py::test_stopped_after_each_block_it_ends_with_the_same_files[LlamaForCausalLM-fields2]",
    "tests/streaming/test_calibrated.py::test_stopped_after_each_block_it_ends_with_the_same_files[Gemma2ForCausalLM-fields5]",
    "tests/streaming/test_calibrated.py::test_stopped_after_each_block_it_ends_with_the_same_files[MixtralForCausalLM-fields7]",
    "tests/streaming/test_walking_processes.py::test_killed_at_any_moment_it_ends_with_the_same_files",
    "tests/test_contributing.py::test_the_method_of_the_page_passes_the_contract_from_a_package_of_its_own",
    "tests/test_distributed_page.py::test_its_commands_run_in_both_processes",
    "tests/test_examples.py::test_chunked_loss_example",
    "tests/test_examples.py::test_lora_example",
    "tests/test_examples.py::test_merge_example",
    "tests/test_examples.py::test_quantize_example",
    "tests/test_examples.py::test_serving_example",
    "tests/test_examples.py::test_the_demo_runs_on_another_model",
    "tests/test_readme.py::test_a_block_runs_as_it_stands_and_prints_what_the_readme_says[shell]",
)


def is_thorough(node_id: str) -> bool:
    """Whether a test, ``tests/...::test_...``, is one of ``THOROUGH``."""
    return node_id.startswith(THOROUGH)


def is_slow(node_id: str) -> bool:
    """Whether a test, ``tests/...::test_...``, is one of ``SLOW``."""
    return node_id.startswith(SLOW)


def mirrors_of(changed: str, existing: Iterable[str]) -> list[str]:
    """The tests that mirror a changed file of the repository.

    A test file is its own; ``peft_quantlayers/lora/layer.py`` has ``tests/lora/test_layer.py``, or all of
    ``tests/lora`` where there is no such file; ``hqq/cpu.py`` of the kernels has ``tests/kernels/test_hqq_cpu.py``.

    Args:
        changed: path from the root.
        existing: paths of all files of the tests.
    """
    existing = set(existing)
    path = PurePosixPath(changed)
    if path.parts[0] == "tests":
        return [changed] if changed in existing and path.name.startswith("test_") else []
    if path.parts[0] == "kernels":
        package, inner = "kernels", path.parts[2:]
    elif path.parts[0] == "peft_quantlayers" and len(path.parts) > 2:
        package, inner = path.parts[1], path.parts[2:]
    elif path.parts[0] == "peft_quantlayers":
        package, inner = "", path.parts[1:]
    else:
        return []
    parents, stem = [part for part in inner[:-1] if part != "csrc"], path.stem
    folder = f"tests/{package}" if package else "tests"
    for name in ("_".join([*parents, stem]), stem, "_".join(parents)):
        if f"{folder}/test_{name}.py" in existing:
            return [f"{folder}/test_{name}.py"]
    return [folder] if package and any(file.startswith(f"{folder}/test_") for file in existing) else []


def changed_files() -> list[str]:
    """Files that differ from the main branch, committed or not; none without git."""
    found: list[str] = []
    for command in (
        ["git", "merge-base", "HEAD", "main"],
        ["git", "diff", "--name-only", "HEAD"],
        ["git", "ls-files", "--others", "--exclude-standard"],
    ):
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return []
        lines = done.stdout.splitlines() if done.returncode == 0 else []
        if command[1] == "merge-base" and lines:
            since = ["git", "diff", "--name-only", lines[0]]
            lines = subprocess.run(since, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
        found += lines
    return sorted(set(found))


def selected(changed: Iterable[str]) -> list[str]:
    """Paths for pytest: ``ALWAYS`` and the tests of the files ``changed``, none inside another."""
    existing = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py")]
    paths = sorted({*ALWAYS, *(test for file in changed for test in mirrors_of(file, existing))})
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


if __name__ == "__main__":
    print(*selected(changed_files()))
