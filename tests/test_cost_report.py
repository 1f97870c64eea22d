"""The estimate of work as a user sees it: in the report, in the diff, in words."""

from __future__ import annotations

import html

import pytest
import torch
from torch import nn

import fxopt
from fxopt import cost
from fxopt.cost import Cost
from fxopt.dot import detail_lines
from fxopt.graphdiff import GraphDiff
from fxopt.journal import Decline, Journal
from fxopt.render import to_html
from fxopt.report import Report

#: These alone: what other passes save has its own tests.
PASSES = ("fold-batchnorm", "fuse-conv-activation")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.relu(self.norm(self.conv(x))), x], 1)


def test_the_report_says_what_each_pass_saved() -> None:
    report = fxopt.compile(Net().eval(), (torch.randn(1, 3, 8, 8),), passes=PASSES).report
    before, after = report.work_before, report.work_after
    assert (before.work.launches, after.work.launches) == (4, 2)
    assert before.work.flops - after.work.flops == 2 * 192  # the norm's; the relu is computed all the same
    assert before.work.moved - after.work.moved == 4 * (4 * 192 + 12)
    assert before.work.copied == after.work.copied == 4 * 384
    said = {result.name: result.change for result in report.passes if result.change}
    assert list(said) == list(PASSES)
    assert said["fold-batchnorm"].startswith("-1 launch, -384 FLOP, -1.58 kB moved, -")
    assert "copied" not in said["fold-batchnorm"]
    assert report.estimate.startswith(f"estimated on cpu ({torch.get_num_threads()} threads): ")
    assert report.estimate in str(report).replace("\n", " ")
    plain = report.to_dict()
    assert plain["work"]["after"]["launches"] == 2
    assert plain["passes"][0]["work"]["before"] == plain["work"]["before"]


def test_before_the_first_call_the_report_says_that_nothing_is_estimated() -> None:
    fast = fxopt.compile(Net().eval(), passes=PASSES)
    assert fast.report.estimate == "work is not estimated: shapes are not known"
    assert [result.change for result in fast.report.passes if result.rewrites] == ["unknown", "unknown"]
    fast(torch.randn(1, 3, 8, 8))
    assert (fast.report.work_before.work.launches, fast.report.work_after.work.launches) == (4, 2)


def test_both_front_ends_have_the_same_estimate() -> None:
    model, image = Net().eval(), torch.randn(1, 3, 8, 8)
    traced = fxopt.compile(model, passes=PASSES)
    traced(image)
    exported = fxopt.compile(model, (image,), passes=PASSES)
    assert traced.report.estimate == exported.report.estimate


def test_the_diff_shows_the_work_of_each_node() -> None:
    diff = fxopt.compile(Net().eval(), (torch.randn(1, 3, 8, 8),), passes=PASSES).diff()
    works = {node.name: (node.flops, node.moved, node.copied) for node in diff.after if node.compute}
    assert works["cat"] == (0, 4 * 4 * 192, 4 * 384)
    assert works["convolution"] == (2 * 192 * 3 + 192, 4 * (2 * 192 + 12), 0)
    (tooltip,) = [detail_lines(node) for node in diff.after if node.name == "convolution"]
    assert "work: 1.34 kFLOP, 1.58 kB moved" in tooltip
    (tooltip,) = [detail_lines(node) for node in diff.after if node.name == "cat"]
    assert "work: 3.07 kB moved, 1.54 kB of them copied" in tooltip
    assert diff.estimate in str(diff)
    assert diff.estimate in html.unescape(to_html(diff))
    assert GraphDiff.from_dict(diff.to_dict()) == diff


def test_the_diff_of_one_pass_has_its_own_totals() -> None:
    fast = fxopt.compile(Net().eval(), (torch.randn(1, 3, 8, 8),), passes=PASSES)
    work = fast.diff("fold-batchnorm").work
    assert (work["before"]["launches"], work["after"]["launches"]) == (4, 3)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "B", "0 B"),
        (12, "FLOP", "12 FLOP"),
        (8.2176e9, "FLOP", "8.22 GFLOP"),
        (-425995840, "B", "-426 MB"),
        (1.0e12, "FLOP", "1 TFLOP"),
        (0.0000031, "s", "3.1 µs"),
        (0.115, "s", "115 ms"),
        (2.5, "s", "2.5 s"),
    ],
)
def test_amounts_in_words(number: float, unit: str, text: str) -> None:
    assert cost.amount(number, unit) == text


def test_work_that_is_not_known_is_named_and_left_out() -> None:
    known, part = cost.Total(Cost(10, 4, 4, 0, 1), 1.0, 0, "unit"), cost.Total(Cost(5, 4, 4, 0, 1), 0.5, 2, "unit")
    assert cost.change(known, part) == "unknown"
    assert cost.change(part, part) == ""
    assert cost.describe(part, part).endswith("; without 2 operations whose work is not known")
    assert cost.describe(cost.Total(), cost.Total()) == ""


def test_alike_reasons_are_counted_together_and_one_alone_is_said_whole() -> None:
    reasons = ("8 bytes are copied", "16 bytes are copied", "the strides would change from (4, 2) to (2, 4)")
    made = [Decline("some-pass", "rule", f"node_{index}", reason, ()) for index, reason in enumerate(reasons)]
    journal = Journal([], {(decline.rule, decline.node): decline for decline in made})
    report = Report("M", "export", "aten", 1, 1, [], journal)
    assert report.common_reasons() == [
        ("some-pass: … bytes are copied", 2),
        ("some-pass: the strides would change from (4, 2) to (2, 4)", 1),
    ]


def test_without_verification_the_report_says_so() -> None:
    report = fxopt.compile(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), verify=False).report
    assert "not verified: verify=False" in str(report)
