"""Ray Train's controller as we run it: which failures it tries again, with how many workers, who hangs, who leaves a node in time."""

from __future__ import annotations

import asyncio
from typing import Any

from pipelines.train.elastic import scaling_policy
from pipelines.train.messages import Tell
from pipelines.train.overseer import overseer
from pipelines.train.retry import failure_policy


def trainer_class(private: bool, counts: list[int], hang_timeout_s: float, tell: Tell, controllers: list[Any] | None) -> Any:
    """TorchTrainer that gives up at once where trying again cannot help, that starts nothing which a run has no use for, and
    that puts its controller's handle into `controllers`; None = its controller runs in this process.

    `counts` are the numbers of workers that it may run with, ascending.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            # On this machine alone: each is an actor more, for Ray Data and for a controller lost with its node.
            unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if private else set()
            # Ours first: the others then see whom it calls failed.
            return [overseer(hang_timeout_s, tell), *(c for c in callbacks if type(c).__name__ not in unused)]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["scaling_policy"] = scaling_policy(self.scaling_config, counts, private, tell)
            settings["failure_policy"] = failure_policy(self.run_config.failure_config, counts[-1], tell)
            if controllers is None:
                controller = TrainController(**settings)
                try:
                    asyncio.run(controller.run())
                finally:  # Tune ends a trial by SystemExit out of a report
                    group = controller.get_worker_group()
                    if group is not None:
                        group.shutdown()
                return controller.get_result()
            # As the parent does, which keeps the handle to itself; Ctrl-C needs it.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            env = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            # Else who frees the workers' cores when the controller is killed finds no Ray where there are two on a machine.
            env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": env})(TrainController)
            controllers.append(actor.remote(**settings))
            ray.get(controllers[0].run.remote())
            return ray.get(controllers[0].get_result.remote())

    return Trainer
