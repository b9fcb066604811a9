"""The canary: Ray, FFCV and numba still have the private names that we use, with the parameters and callers that we rely on."""

from __future__ import annotations

import importlib
import inspect
import mmap
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

# Their module: the names that a file of ours uses. `a(b,c)` is a function or dataclass that takes b and c. `a<b.c`: the code of b.c
# names a, which it sets, or calls where we override it. `a=b` has this value. "~" is Ray Train's internal package.
RAY = """
ray._private.worker: _global_node
ray._private.node: Node.is_head(self) Node.kill_all_processes(self,check_alive,allow_graceful)
ray._private.node: start_monitor<Node.start_head_processes start_api_server<Node.start_head_processes
ray._private.node: start_log_monitor<Node.start_ray_processes
ray._private.services: ENABLE_RAY_CLUSTER<get_node_ip_address get_dashboard_dependency_error<start_raylet
ray._private.ray_constants: ENABLE_RAY_CLUSTER=True
ray._private.utils: get_dashboard_dependency_error() set_sigterm_handler(sigterm_handler)
ray._private.worker: _temp_dir<init set_sigterm_handler<init
ray._raylet: Config.initialize(config_list) AuthenticationTokenLoader.instance() AuthenticationTokenLoader.reset_cache(self)
ray._private.state: state.get_draining_nodes() state.available_resources_per_node()
ray._private.runtime_env.packaging: _dir_travel(path,excludes,handler,include_gitignore,logger) _dir_travel<_zip_files
ray._private.ray_constants: DASHBOARD_CLIENT_MAX_SIZE=104857600
ray._private.auto_init_hook: enable_auto_connect
ray._raylet: GcsClient RAY_NODE_ID_KEY=ray.io/node-id
ray._raylet: InnerGcsClient.drain_node(self,node_id,reason,reason_message,deadline_timestamp_ms,timeout)
ray.core.generated.autoscaler_pb2: DRAIN_NODE_REASON_PREEMPTION
ray._common.usage.usage_constants: USAGE_STATS_ENABLED_ENV_VAR=RAY_USAGE_STATS_ENABLED
ray._common.constants: RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR=RAY_WARN_BLOCKING_GET_INSIDE_ASYNC
ray._private.accelerators.accelerator: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR=RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
ray.train.constants: TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S=TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
ray.train: ControllerError(controller_failure) WorkerGroupError(worker_failures) FailureConfig(max_failures,max_preemption_failures)
ray.train: PreemptionInfo(deadline_ms) PreemptionInfo.preempted_ranks
ray.train.torch: _create_default_callbacks<TorchTrainer.fit _initialize_and_run_controller<TorchTrainer.fit
~.constants: METRICS_ENABLED_ENV_VAR=RAY_TRAIN_METRICS_ENABLED get_env_vars_to_propagate()
~.constants: WORKER_GROUP_START_TIMEOUT_S_ENV_VAR=RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S
~.constants: WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR=RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S
~.constants: HEALTH_CHECK_INTERVAL_S_ENV_VAR=RAY_TRAIN_HEALTH_CHECK_INTERVAL_S
~.constants: ENABLE_PREEMPTION_WATCHER_ENV_VAR=RAY_TRAIN_ENABLE_PREEMPTION_WATCHER
~.callbacks.datasets: DatasetsCallback
~.callbacks.placement_group_callback: PlacementGroupCleanerCallback
~.execution.controller: TrainController(scaling_policy,failure_policy,callbacks) TrainController.run(self) TrainController.abort(self)
~.execution.controller: TrainController.get_result(self) TrainController.get_worker_group(self) make_decision<TrainController._step
~.execution.controller: make_decision_for_running_worker_group<TrainController._step
~.execution.failure_handling: FailureDecision.RETRY FailureDecision.RAISE DefaultFailurePolicy(failure_config)
~.execution.failure_handling: DefaultFailurePolicy.make_decision(self,training_failed_error)
~.execution.failure_handling: _worker_group_failures<DefaultFailurePolicy.make_decision
~.exceptions: WorkerGroupStartupTimeoutError WorkerGroupStartupFailedError WorkerHealthCheckFailedError(failure)
~.exceptions: health_check_failure<WorkerHealthCheckFailedError.__str__
~.execution.scaling_policy: NoopDecision ResizeDecision(num_workers) FixedScalingPolicy.after_controller_start(self,train_run_context)
~.execution.scaling_policy: _maybe_send_resource_request<FixedScalingPolicy.make_decision_for_non_running_worker_group
~.execution.scaling_policy: _maybe_send_resource_request<FixedScalingPolicy.make_decision_for_running_worker_group
~.execution.scaling_policy: ElasticScalingPolicy(scaling_config) ElasticScalingPolicy._count_possible_workers(self,reserved_resources)
~.execution.scaling_policy: _count_possible_workers<ElasticScalingPolicy.make_decision_for_non_running_worker_group
~.execution.scaling_policy: _count_possible_workers<ElasticScalingPolicy.make_decision_for_running_worker_group
~.execution.callback: WorkerGroupCallback.after_worker_group_poll_status(self,worker_group_status)
~.execution.callback: WorkerGroupCallback.on_worker_group_start(self)
~.execution.worker_group: before_init_train_context<WorkerGroup._init_train_context Worker(actor)
~.execution.worker_group: WorkerGroup.get_workers(self) WorkerGroup.shutdown(self) after_worker_group_start<WorkerGroup._start_impl
~.execution.worker_group: after_worker_group_training_start<WorkerGroup._start_impl before_worker_group_shutdown<WorkerGroup.shutdown
~.execution.worker_group: after_worker_group_poll_status<WorkerGroup.poll_status WorkerGroupState(start_time,workers)
~.execution.worker_group: WorkerGroupState.num_workers Worker(metadata) Worker.execute_async(self,fn)
~.execution.worker_group: ActorMetadata(hostname,node_id,node_ip,pid)
~.execution.worker_group: WorkerStatus(error) WorkerGroupPollStatus(worker_statuses) WorkerGroupPollStatus.errors
~.execution.worker_group: WorkerGroupPollStatus.get_preemption_info(self)
"""
START = """
ray.train._internal.utils: get_address_and_port()
ray.train.torch.config: _set_torch_distributed_env_vars()
ray.train.torch.config: _setup_torch_process_group(backend,world_rank,world_size,init_method,timeout_s)
ray.train.torch: TorchConfig.backend_cls
ray.train.v2._internal.callbacks.backend_setup: on_start<BackendSetupCallback.after_execution_group_start
ray.train.v2._internal.execution.worker_group: _worker_cls<WorkerGroup._create_workers RayTrainWorker
ray._raylet: CoreWorker.kill_actor(self,actor_id,no_restart)
ray._private.worker: global_worker
ray._private.state: state._connect_and_get_accessor
ray.core.generated.gcs_pb2: ActorTableData.ALIVE ActorTableData.DEAD ActorTableData.FromString
"""
USED = {
    "pipelines/train/ray_private.py": RAY.replace("~", "ray.train.v2._internal"),
    "pipelines/train/ray_start.py": START,
    "simclr/data/ffcv/imports.py": "ffcv.fields.rgb_image: IMAGE_MODES Dict\nnumba.typed: Dict",
    "simclr/data/ffcv/signatures.py": "numba.core.dispatcher: Dispatcher.nopython_signatures",
    "simclr/data/ffcv/decode.py": """
ffcv.libffcv: imdecode(source,dst,source_height,source_width,crop_height,crop_width)
ffcv.libffcv: imdecode(offset_x,offset_y,scale_factor_num,scale_factor_denom,enable_crop,do_flip)
ffcv.pipeline.allocation_query: AllocationQuery(shape,dtype)
ffcv.pipeline.compiler: Compiler.compile(code) Compiler.get_iterator() Compiler.num_threads is_parallel<Compiler.compile
ffcv.pipeline.operation: Operation.accept_globals(self,metadata,memory_read) Operation.generate_code(self)
ffcv.pipeline.operation: Operation.declare_state_and_memory(self,previous_state)
ffcv.pipeline.state: State(jit_mode,device,shape,dtype)
numba.core.types: int64 void
""",
    "simclr/data/ffcv/reader.py": """
ffcv.reader: metadata<Reader.read_metadata alloc_table<Reader.read_allocation_table
ffcv.types: ALLOC_TABLE_TYPE FieldDescType HeaderType
""",
    "simclr/data/ffcv/resize.py": """
numba.core.cgutils: alloca_once_value(builder,value) for_range(builder,count,intp)
numba.core.types: void int64
""",
    "simclr/data/ffcv/writer.py": """
ffcv.types: CURRENT_VERSION=2 get_metadata_type(handlers) ALLOC_TABLE_TYPE FieldDescType HeaderType
ffcv.fields: RGBImageField.to_binary(self) IntField.to_binary(self)
""",
    "simclr/data/loader.py": """
ffcv.fields.rgb_image: SimpleRGBImageDecoder()
ffcv.pipeline.compiler: Compiler.num_threads
numba.core.config: NUMBA_NUM_THREADS
""",
}
# Our file, a file of Ray's, a text in it: settings, a node's command line, the file that `ray up` leaves, the format of its files.
RAYLET = "core/src/ray/raylet/raylet"
WRITTEN = [
    ("pipelines/train/ray_private.py", RAYLET, "worker_niceness"),
    ("pipelines/train/ray_private.py", RAYLET, "prestart_worker_first_driver"),
    ("pipelines/train/ray_private.py", RAYLET, "enable_metrics_collection"),
    ("pipelines/train/ray_private.py", "_private/node.py", "Last connection error: {last_ex}"),
    ("pipelines/train/own_ray.py", RAYLET, "RAY_AUTH_TOKEN"),
    ("cluster/onprem.yaml", RAYLET, "enable_autoscaler_v2"),
    ("pipelines/clusterfile/preemption.py", "_private/services.py", "--node_id="),
    ("pipelines/clusterfile/preemption.py", "_private/services.py", "--gcs-address="),
    ("pipelines/train/capacity.py", "autoscaler/_private/command_runner.py", "~/ray_bootstrap_config.yaml"),
    ("pipelines/commands/cluster.py", "autoscaler/ray-schema.json", "available_node_types"),
]


def trouble(module: str, what: str) -> str:
    """The change of `what` in `module`, or ""."""
    name, sign, rest = re.fullmatch(r"([\w.]+)(?:([<=(])(.*?)\)?)?", what).groups()  # type: ignore[union-attr]
    place = importlib.import_module(module)
    found: Any = place
    for part in (rest if sign == "<" else name).split("."):
        found = getattr(found, part, trouble)
    if found is trouble:
        return "is gone"
    if sign == "=":
        return "" if str(found) == rest else f"is {found!r} now"
    if sign == "<":
        named = {*inspect.unwrap(found).__code__.co_names, *inspect.unwrap(found).__code__.co_consts}
        return "" if name in named else "does not name it any more"
    missing = {*filter(None, (rest or "").split(","))} - {*(inspect.signature(found).parameters if sign else ())}
    return f"has no {' and no '.join(sorted(missing))} any more" if missing else ""


@pytest.mark.parametrize("ours", USED)
def test_what_is_private_is_still_as_we_take_it(ours: str) -> None:
    import simclr.data.ffcv.imports  # noqa: F401  (FFCV as the program imports it)

    lines = [line.partition(": ") for line in USED[ours].strip().splitlines()]
    wrong = [f"{module}.{what}: {it}; mend {ours}" for module, _, all_ in lines for what in all_.split() if (it := trouble(module, what))]
    assert not wrong, "\n".join(["another version, with other private names:", *wrong])


def test_the_canary_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of change: a missing name, another parameter, an override without a caller, another value."""
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus

    monkeypatch.delattr(WorkerGroupPollStatus, "get_preemption_info")
    monkeypatch.setattr(Worker, "execute_async", lambda self, function: None)
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda self: self._count_workers())
    monkeypatch.setattr(constants, "HEALTH_CHECK_INTERVAL_S_ENV_VAR", "RAY_TRAIN_POLL_INTERVAL_S")
    with pytest.raises(AssertionError) as died:
        test_what_is_private_is_still_as_we_take_it("pipelines/train/ray_private.py")
    at, end = "ray.train.v2._internal.", "; mend pipelines/train/ray_private.py"
    for line in (
        f"{at}execution.worker_group.WorkerGroupPollStatus.get_preemption_info(self): is gone{end}",
        f"{at}execution.worker_group.Worker.execute_async(self,fn): has no fn any more{end}",
        f"{at}execution.scaling_policy._count_possible_workers<ElasticScalingPolicy.make_decision_for_non_running_worker_group: "
        f"does not name it any more{end}",
        f"{at}constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR=RAY_TRAIN_HEALTH_CHECK_INTERVAL_S: is 'RAY_TRAIN_POLL_INTERVAL_S' now{end}",
    ):
        assert line in str(died.value)


@pytest.mark.parametrize(("ours", "theirs", "text"), WRITTEN)
def test_files_of_rays_still_say_what_we_take_from_them(ours: str, theirs: str, text: str) -> None:
    import ray

    with (Path(ray.__file__).parent / theirs).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(text.encode()) >= 0, f"Ray's {theirs} does not say {text!r} any more; mend {ours}"


def test_no_other_file_names_what_is_private_to_ray() -> None:
    private = re.compile(r"ray\.(_\w|\w+(\.\w+)*\._)|ray\.train\.v2|ray\._|_system_config|_not_none|\bRAY_TRAIN_\w+|_worker_group_failures")
    paths = sorted(p for room in ("simclr", "pipelines", "tune") for p in (ROOT / room).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): match[0] for path in paths if (match := private.search(path.read_text()))}
    assert found.keys() == {"pipelines/train/ray_private.py", "pipelines/train/ray_start.py"}, found
