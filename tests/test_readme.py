"""The README's commands are commands that the programs take, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import parallel
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.S)
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(BLOCKS), re.M)) | {"seed": "0"}
COMMANDS = sorted({re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], line.split("#")[0].strip())
                   for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()
                   if re.match(r"\s*(python (train|eval|data|model|tests/bench)\.py|torchrun )", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, in_folder, monkeypatch):
    """Every command line is parsed by its own program, and train.py's settings are possible ones."""
    import data
    import eval as evaluation
    import model
    launcher, program, *args = shlex.split(command)
    world = 1
    if launcher == "torchrun":
        launched = get_args_parser().parse_args([program, *args])
        program, args = launched.training_script, launched.training_script_args
        world = int(launched.nnodes.split(":")[-1]) * int(launched.nproc_per_node)
    if program == "train.py":
        typed = train.parse(args)
        if not typed.get("init_from"):                            # needs the run that it names
            settings, config, _ = train.resolve(typed)
            parallel.check_layout(world, settings.ep, settings.replicate, config.n_expert, "cpu", "auto")
        return
    if program == "tests/bench.py":
        import bench
        assert bench.parse(args).rounds
        return
    main = {"data.py": data, "eval.py": evaluation, "model.py": model}[program].main

    class Parsed(Exception):
        pass
    real = data.argparse.ArgumentParser.parse_known_args

    def parse(self, *rest):
        settings = real(self, *rest)
        if self.prog == program and not settings[1]:              # subcommands have a longer name
            raise Parsed
        return settings
    monkeypatch.setattr(data.argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        main(args)


def test_there_are_commands_and_files():
    assert len(COMMANDS) > 8
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
