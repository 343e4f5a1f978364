"""The `condgen-fast` command: each subcommand's options are the fields of one dataclass."""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches

# command -> (module, options dataclass or None, what it does); modules are imported only when asked for
COMMANDS: dict[str, tuple[str, str | None, str]] = {
    "train transformer": ("recipes.train_transformer", "TrainTransformer", "train an autoregressive Transformer"),
    "train cmlm": ("recipes.train_cmlm", "TrainCMLM", "train a conditional masked language model (Mask-Predict)"),
    "train levenshtein": ("recipes.train_levenshtein", "TrainLevenshtein", "train a Levenshtein Transformer"),
    "train masked_lm": ("recipes.train_masked_lm", "TrainMaskedLM", "train a masked-diffusion language model"),
    "distill": ("recipes.distill", "Distill", "translate a training source with a teacher: sequence-level KD"),
    "translate": ("recipes.translate", "Translate", "translate text, one sentence a line"),
    "evaluate": ("recipes.evaluate", "Evaluate", "score a model, or a file of translations, on a test set"),
    "show": ("recipes.show", "Show", "write a page that shows decoding step by step, strategies side by side"),
    "corpus": ("data.corpus", "Corpus", "build the corpora from Debian packages"),
    "demo": (
        "recipes.demo",
        "Demo",
        "compare greedy, beam, Mask-Predict and Levenshtein decoding on the shipped models",
    ),
    "bench": ("recipes.bench", "Bench", "run the benchmarks of a source checkout"),
    "doctor": ("doctor", None, "print versions, what was built, and which implementation each op uses here"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command -> exit status.

    0; 1 for an error of its input, 2 for a wrong command line, 130 after Ctrl-C, 141 when its output has no reader.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    words = 2 if arguments[0] == "train" and len(arguments) > 1 else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if arguments[0] == "train" and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_help(only="train "))
        return 0 if len(arguments) > 1 else 2
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        print(f"condgen-fast: unknown command {name!r}{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    module_name, options_name, _ = COMMANDS[name]
    module = importlib.import_module(f"condgen_fast.{module_name}")
    try:
        if options_name is None:
            if rest:
                print(f"condgen-fast {name} takes no options; got {' '.join(rest)}", file=sys.stderr)
                return 2
            module.main()
        else:
            import tyro

            options = tyro.cli(getattr(module, options_name), prog=f"condgen-fast {name}", args=rest)
            module.main(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough of it; what is left must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"condgen-fast {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"condgen-fast {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _help(only: str = "") -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items() if name.startswith(only)]
    return "usage: condgen-fast COMMAND [options]      (condgen-fast COMMAND --help lists them)\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
