"""`optimum-cli pcdvq`: the commands of `hf-pcdvq`, under Optimum's roof. Optimum imports this file at every start."""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class PcdvqCommand(BaseOptimumCLICommand):
    """Hands everything after its name on."""

    COMMAND = CommandInfo(name="pcdvq", help="Quantize models to 2 to 3 bits per weight with hf_pcdvq.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = (
            "The commands of hf-pcdvq: quantize, estimate, eval, generate, push and so on. Without any, "
            "`optimum-cli pcdvq` lists them; `optimum-cli pcdvq quantize --help` explains one."
        )
        parser.add_argument("arguments", nargs=REMAINDER, metavar="COMMAND ...", help="as for hf-pcdvq")

    def run(self) -> None:
        from hf_pcdvq_cli import main

        main(args=self.args.arguments or ["--help"], prog_name="optimum-cli pcdvq")


REGISTER_COMMANDS = [PcdvqCommand]
