"""Weights & Biases, for who asks for it with `--track`: a row there for every row of progress.csv, once."""

import contextlib
import hashlib
import re
from collections.abc import Callable

from common.errors import UserError


def start(args, name: str) -> Callable[[int, dict], None]:
    """Open the run, or go on with it: a function that sends a row of scalars, given its place among all rows.

    Rows that are there already are not sent again after a resume. Raises UserError where there is no login, no network,
    or a name that is refused.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--track needs Weights & Biases; install it with: pip install wandb") from error
    project, entity = args.wandb_project_name, args.wandb_entity
    try:
        wandb.init(project=project, entity=entity, config=vars(args), name=name, id=run_id(name), resume="allow")
    except Exception as error:  # in as many ways as there are networks
        reason = str(error).strip().rstrip(".")
        raise UserError(
            f"Weights & Biases does not open a run ({reason}); try `wandb login`, another --wandb-project-name or "
            "--wandb-entity, the environment variable WANDB_MODE=offline, or leave --track out"
        ) from error
    sent = 0
    with contextlib.suppress(AttributeError):  # what stands in for wandb in a test may lack these
        wandb.define_metric("*", step_metric="global_step")
        sent = wandb.run.step

    def send(place: int, row: dict) -> None:
        if place >= sent:
            wandb.log(row, step=place)

    return send


def run_id(name: str) -> str:
    """A run's name with what W&B refuses in an id, some characters and lengths above 128, taken out; one for each."""
    plain = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:100]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
