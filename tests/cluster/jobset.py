"""What Kubernetes and JobSet do with a manifest, for processes of this machine.

Only what the manifests of this repository use: one replicated job of indexed pods without retries of
its own, a policy on exit codes, and the rules of the set.
"""

import signal
import time
from pathlib import Path
from typing import NamedTuple

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cluster"


class Outcome(NamedTuple):
    """The end of a set: whether all pods succeeded, and the exit codes of each start."""

    completed: bool
    codes: list[list[int]]


class JobSet:
    """A manifest, and the pods that it starts."""

    def __init__(self, name):
        self.tree = yaml.safe_load((CONFIGS / name).read_text())
        self.policy = self.tree["spec"]["failurePolicy"]
        [replicated] = self.tree["spec"]["replicatedJobs"]
        self.job = replicated["template"]["spec"]
        self.name = replicated["name"]
        self.pod = self.job["template"]["spec"]
        [self.container] = self.pod["containers"]

    def arguments(self, process):
        """The arguments of a pod's container, its environment put in."""
        return [text.replace("$(PROCESS)", str(process)) for text in self.container["args"]]

    def run(self, start, *, disturb=lambda attempt, pods: None, grace=30.0):
        """Start pods by ``start(index)`` and act on their ends until the set has ended.

        ``disturb(attempt, pods)`` is called once the pods of an attempt are started.
        """
        codes = []
        while True:
            pods = [start(index) for index in range(self.job["parallelism"])]
            disturb(len(codes), pods)
            ended = self._ends(pods, grace)
            codes.append([pod.returncode for pod in pods])
            reason = self._failure([pod.returncode for pod in ended])
            if reason is None:
                return Outcome(True, codes)
            action = self._action(reason)
            if action == "FailJobSet" or len(codes) > self.policy["maxRestarts"]:
                return Outcome(False, codes)
            assert action == "RestartJobSet"

    def _ends(self, pods, grace):
        """The pods in the order of their ends; those that are left at a failure are ended."""
        ended, told = [], None
        while len(ended) < len(pods):
            for pod in pods:
                if pod not in ended and pod.poll() is not None:
                    ended.append(pod)
            left = [pod for pod in pods if pod not in ended]
            if told is None and self._failure([pod.returncode for pod in ended]) is not None:
                told = time.monotonic()
                for pod in left:
                    pod.send_signal(signal.SIGTERM)
            if told is not None and time.monotonic() - told > grace:
                for pod in left:
                    pod.kill()
            time.sleep(0.02)
        return ended

    def _failure(self, codes):
        """The reason for which the job has failed, by the exit codes of pods that ended."""
        failed = [code for code in codes if code != 0]
        for code in failed:
            for rule in self.job["podFailurePolicy"]["rules"]:
                wanted = rule["onExitCodes"]
                assert wanted["operator"] == "In"
                assert wanted["containerName"] == self.container["name"]
                if code in wanted["values"]:
                    assert rule["action"] == "FailJob"
                    return "PodFailurePolicy"
        return "BackoffLimitExceeded" if len(failed) > self.job["backoffLimit"] else None

    def _action(self, reason):
        """The first rule of the set that fits; without one it restarts."""
        for rule in self.policy["rules"]:
            reasons = rule.get("onJobFailureReasons", [])
            if not reasons or reason in reasons:
                return rule["action"]
        return "RestartJobSet"
