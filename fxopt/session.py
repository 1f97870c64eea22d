"""One compiled model's captures: choosing, making and proving the program for a call.

A call that no program's guards admit gets a capture of its own, from a private original, and is compared with it. A
call that they admit, but in a state never seen (a batch of 0 or 1, a stride order, autocast, gradients), is first run
on both sides with every operator logged; where they differ it, too, gets a capture of its own.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import agreement, held, ir, normalize, plugins, trained
from fxopt.capture import Captured, Inputs, capture_export, capture_symbolic, private_copy
from fxopt.capture.program import register_dataclasses
from fxopt.compare import Verdict, compare
from fxopt.errors import CaptureError, FxoptError, InputError, UsageError, VerificationError
from fxopt.guards import Guards
from fxopt.journal import Journal
from fxopt.lowering.backend import Setting, set_concrete_values
from fxopt.lowering.weights import Weights
from fxopt.pipeline import PassManager, PassResult, flat, only
from fxopt.program import (
    KEPT,
    Options,
    Program,
    Specialisation,
    choose_backend,
    concrete_module,
    describe,
    lower,
    make_program,
)
from fxopt.report import Report
from fxopt.signature import lowering_key, proof_state
from fxopt.state import KeptState, privatise
from fxopt.trial import in_float64, left, seeded

#: How many captures a model keeps.
MOST_PROGRAMS = 8


@dataclass
class Session:
    """The private original, the options, and the programs made so far; the first is the one that the report is about.

    `trained` has the identities of the parameters that shall be trained: they require grad in every capture.
    """

    original: torch.nn.Module
    name: str
    options: Options
    programs: list[Program] = field(default_factory=list)
    discarded: bool = False
    packed: Weights = field(default_factory=Weights)
    converted: bool = False
    trained: frozenset[Any] = frozenset()
    restless: list[str] = field(default_factory=list)
    before: fx.GraphModule = field(init=False)
    after: fx.GraphModule = field(init=False)
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.start_empty([])

    # -- making programs ---------------------------------------------------------------------------------------------

    def start_symbolic(self) -> None:
        """Captures without inputs. Raises CaptureError where the model cannot be traced."""
        start = time.perf_counter()
        captured = capture_symbolic(private_copy(self.original))
        self._privatise(captured)
        self._adopt(captured, {"capture": time.perf_counter() - start}, None)

    def start_empty(self, notices: list[str]) -> None:
        """Waits for the first call, which brings inputs to capture with."""
        graph = fx.Graph()
        graph.output(())
        leaf = pytree.tree_flatten(((), {}))[1]
        empty = ir.new_module(graph, ir.Interface(leaf, leaf, ()))
        self.before = self.after = empty
        self.report = Report(self.name, "nothing yet", self.options.backend, 0, 0, [], Journal(), notices)
        self.report.verification = "the model is captured at its first call"

    def _adopt(self, captured: Captured, seconds: dict[str, float], inputs: Inputs | None) -> Program:
        judge = None
        if inputs is not None and self.options.verify == "each" and captured.front_end == "export":
            expected = self._run_original(inputs)

            def judge(module: fx.GraphModule) -> Verdict:
                twin, _ = ir.copy(module)
                return self._compare(expected, self._run_graph(twin, inputs), inputs)

        program = make_program(captured, self.name, self.options, seconds, judge)
        if not self.programs:
            program.report.notices[:0] = self.report.notices
            self.before, self.after, self.report = captured.module, program.module, program.report
            waits = "shapes are not known yet; the first call is compared"
            self.report.verification = waits if self.options.verify else "verify=False"
        self.programs.append(program)
        del self.programs[1 : 1 - MOST_PROGRAMS]  # the first is the one that the report is about
        return program

    def _capture(self, inputs: Inputs, dynamic_shapes: str | None, *, grad: bool = True) -> Captured:
        try:
            # A forward that keeps what it computes (a cache in an attribute) must not leave a proxy in the original.
            # Nor may it write to the original's tensors: torch.export runs what it takes for constants.
            with KeptState(self.original):
                captured = capture_export(private_copy(self.original), inputs, dynamic_shapes, grad=grad)
        except CaptureError as error:
            if grad and not torch.is_grad_enabled():
                return self._capture(inputs, dynamic_shapes, grad=False)  # autograd refuses what runs without it
            # Inputs that the original itself refuses are the caller's mistake, not a capture that failed.
            self._run_original(inputs, because=error)
            raise
        self._privatise(captured)
        return captured

    def _privatise(self, captured: Captured) -> None:
        privatise(captured, self.original, [program.captured for program in self.programs])
        if self.trained:
            trained.freeze(captured.module, self.trained, ir.identity)

    def _capture_checked(self, inputs: Inputs, dynamic: str | None) -> Program:
        """A program captured for a call: with open sizes where that says what the model does on these inputs."""
        start, grad, difference = time.perf_counter(), torch.is_grad_enabled(), None
        captured = self._capture(inputs, dynamic)
        if dynamic is not None or not grad:
            guards = Guards.of(captured)
            # A capture may be wrong about sizes of 0 and 1, and loses the model's own no_grad where gradients are off.
            suspect = not grad or any(size in (0, 1) for size in guards.dynamic_sizes(inputs))
            difference = guards.refusal(inputs) or (self._disagreement(captured, inputs) if suspect else None)
            if difference is not None:
                captured = self._capture(inputs, None, grad=grad)
        program = self._adopt(captured, {"capture": time.perf_counter() - start}, inputs)
        if difference is not None:
            program.report.notices.append(f"captured for these inputs only: {difference}")
        return program

    # -- one call ----------------------------------------------------------------------------------------------------

    def specialise(self, inputs: Inputs) -> Specialisation:
        """The program for a call, lowered for it; verified on it where it is the program's first.

        Raises InputError, CaptureError or VerificationError.
        """
        self.refuse_discarded(f"a call on {describe(inputs)} needs")
        setting = Setting.now(inputs.tensors)
        program = self._program_for(inputs, setting)
        first, state = not program.proven, proof_state(program, inputs, setting)
        fresh = state not in program.proven
        key = lowering_key(inputs, setting)
        known = program.lowered.get(key)
        if known is not None and (not fresh or self._serves(known, inputs)):
            program.proven.add(state)
            return known
        self.packed.restore(program.module)
        module, report = concrete_module(program, inputs, self.options)
        main = program is self.programs[0]
        if main and program.symbolic and first:
            self.after, _ = ir.copy(module)
            self.report = report
        backend, notices = choose_backend(self.options.backend, self.options.numerics, module, setting)
        if backend.name in program.refused:
            backend = plugins.backend("aten")
        start = time.perf_counter()
        plain, _ = ir.copy(module)
        self.packed.own(held.rewritten(program, self.after, module, plain), held.callers(self.original, self.programs))
        try:
            made = lower(program, module, backend, self.packed, self.options)
        except Exception as error:
            if self.options.strict or backend.name == "aten":
                raise
            said = str(error) if isinstance(error, FxoptError) else f"{type(error).__name__}: {error}"
            notices.append(f"backend {backend.name} failed, aten runs instead: {said}")
            made = self._portable(program, plain)
        seconds = time.perf_counter() - start
        if main and first:
            self.report.backend = made.backend
            self.report.lowering, self.report.lowering_declines = made.lowering, made.declines
            self.report.seconds["lower"] = seconds
            self.report.notices += [notice for notice in notices if notice not in self.report.notices]
        if fresh and self.options.verify:
            made = self._verified(program, made, plain, inputs)
        program.proven.add(state)
        program.lowered[key] = made
        return made

    def _serves(self, made: Specialisation, inputs: Inputs) -> bool:
        """Whether what was lowered in another state, of gradients say, gives the original's answer in this one."""
        if not self.options.verify:
            return True
        expected = self._run_original(inputs)
        return not self.restless and self._judged(made, expected, inputs).ok

    def _portable(self, program: Program, module: fx.GraphModule) -> Specialisation:
        self.packed.restore()
        twin, _ = ir.copy(module)
        return lower(program, twin, plugins.backend("aten"), self.packed, self.options)

    def _program_for(self, inputs: Inputs, setting: Setting) -> Program:
        refusals = []
        for program in self.programs:
            refusal = program.guards.refusal(inputs)
            if refusal is not None:
                refusals.append(refusal)
                continue
            if proof_state(program, inputs, setting) in program.proven:
                return program
            difference = self._disagreement(program.captured, inputs)
            if difference is None:
                return program
            refusals.append(f"the model takes another branch here: {difference}")
        if self.programs and self.programs[0].symbolic and not self.programs[0].proven:
            # What waited for the first call is not what this call needs: the report is about what is.
            self.programs.pop(0)
            self.start_empty([*self.report.notices, f"captured at the first call, not before it: {refusals[0]}"])
        dynamic = self.options.dynamic_shapes
        if any("another branch" in refusal for refusal in refusals):
            dynamic = None  # what was taken apart by a size must not be captured as if it were open
        return self._capture_checked(inputs, dynamic)

    def _disagreement(self, captured: Captured, inputs: Inputs) -> str | None:
        original = self._flat_original(inputs)
        try:
            with self._kept(captured.module) as kept:
                return agreement.disagreement(original, captured.module, inputs.tensors, kept.put_back)
        except InputError:
            raise
        except Exception as error:
            self._run_original(inputs)  # raises InputError where the original refuses them too
            return f"the capture fails on them: {str(error).splitlines()[0]}"

    # -- the original ------------------------------------------------------------------------------------------------

    def _kept(self, *modules: torch.nn.Module) -> KeptState:
        """What the original and its captures keep is put back behind a run of either, or of `modules`."""
        return KeptState(self.original, *(program.captured.module for program in self.programs), *modules)

    def _flat_original(self, inputs: Inputs, model: torch.nn.Module | None = None) -> Callable[..., list[Any]]:
        model = self.original if model is None else model

        def call(*tensors: torch.Tensor) -> list[Any]:
            args, kwargs = inputs.with_tensors(tensors).call()
            result = model(*args, **kwargs)
            register_dataclasses(result)
            return pytree.tree_leaves(result)

        return call

    def _run_original(self, inputs: Inputs, because: Exception | None = None) -> list[Any]:
        try:
            with self._kept() as kept:
                results = kept.apart(seeded(self._flat_original(inputs), inputs))
                self.restless = kept.changed()
                return results
        except Exception as error:
            known = self._takes()
            raise InputError(
                f"the model does not take these inputs: {type(error).__name__}: {str(error).splitlines()[0]}",
                hint=f"it was given {describe(inputs)}" + (f"; it was compiled for {known}" if known else ""),
            ) from (because or error)

    def _takes(self) -> str:
        if not self.programs:
            return ""
        program = self.programs[0]
        return program.guards.describe(ir.interface(program.captured.module).names)

    def _reference(self, inputs: Inputs) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            with self._kept(), torch.autocast("cpu", enabled=False):
                model = in_float64(self.original)
                wide = tuple(t.double() if t.is_floating_point() else t for t in inputs.tensors)
                return seeded(self._flat_original(inputs, model), inputs.with_tensors(wide))

        return run

    def _compare(self, expected: Sequence[Any], actual: Sequence[Any], inputs: Inputs) -> Verdict:
        return compare(
            list(expected),
            list(actual),
            inputs=left(inputs),
            reference=self._reference(inputs),
            bitwise=self.options.numerics == "bitwise",
        )

    # -- verification ------------------------------------------------------------------------------------------------

    def _verified(
        self, program: Program, made: Specialisation, plain: fx.GraphModule, inputs: Inputs
    ) -> Specialisation:
        """`made`, or what does give the original's answer: the portable backend, or the program with passes undone.

        Raises VerificationError where even the captured graph is wrong, or with strict.
        """
        start = time.perf_counter()
        expected = self._run_original(inputs)
        if self.restless:
            self._refuse_hidden_state(program, inputs)
        verdict = self._judged(made, expected, inputs)
        if not verdict.ok:
            portable = self._portable(program, plain)
            mended = self._compare(expected, self._run(portable, inputs), inputs)
            if not mended.ok:
                made, verdict = self._without_the_guilty(program, expected, inputs, made.backend)
            elif self.options.strict:
                said = f"the backend {made.backend} gives another answer: {verdict.reason}"
                raise VerificationError(said, hint=_HINT)
            else:
                notice = f"backend {made.backend} gave another answer, aten runs instead: {verdict.reason}"
                self._report_of(program).notices.append(notice)
                program.refused.add(made.backend)
                made, verdict = portable, mended
        report = self._report_of(program)
        report.backend, report.verdict = made.backend, verdict
        report.seconds["verify"] = time.perf_counter() - start
        return made

    def _judged(self, made: Specialisation, expected: Sequence[Any], inputs: Inputs) -> Verdict:
        """Whether a specialisation gives the original's answer. One that raises does not, but for the portable one."""
        try:
            actual = self._run(made, inputs)
        except Exception as error:
            if made.backend == "aten":
                raise
            return Verdict(False, math.inf, (), f"{type(error).__name__}: {error}")
        return self._compare(expected, actual, inputs)

    def _report_of(self, program: Program) -> Report:
        return self.report if program is self.programs[0] else program.report

    def _refuse_hidden_state(self, program: Program, inputs: Inputs) -> None:
        """A forward that changes plain attributes is run once more: a capture has what they were at its time."""
        original = self._flat_original(inputs)
        with self._kept() as kept:
            seeded(original, inputs)
            kept.put_back()
            difference = agreement.disagreement(original, program.captured.module, inputs.tensors, kept.put_back)
        if difference is not None:
            raise CaptureError(
                f"forward changes {', '.join(self.restless)}, and its next answer depends on it: {difference}",
                hint="keep what changes in a buffer, and write it in place (self.count += 1 on a tensor)",
            )

    def _run(self, made: Specialisation, inputs: Inputs) -> Sequence[Any]:
        with self._kept(made.module) as kept:
            return kept.apart(seeded(made.run, inputs))

    def _run_graph(self, module: fx.GraphModule, inputs: Inputs) -> Sequence[Any]:
        run = plugins.backend("aten").build(module, Weights())
        with self._kept(module) as kept:
            return kept.apart(seeded(run, inputs))

    def _without_the_guilty(
        self, program: Program, expected: Sequence[Any], inputs: Inputs, backend: str
    ) -> tuple[Specialisation, Verdict]:
        """The program without the passes that change the answer, which the report names.

        Raises VerificationError where the capture itself is wrong, where no pass is to blame, or with strict.
        """
        self.packed.restore()
        guilty = {result.name: result for result in self._blamed(program, expected, inputs)}
        innocent = only(self.options.passes, lambda current: current.name not in guilty)
        again = make_program(
            program.captured, self.name, replace(self.options, passes=innocent), program.report.seconds
        )
        rows = {result.name: result for result in (*again.report.passes, *guilty.values())}
        again.report.passes = [rows[current.name] for current in flat(self.options.passes)]
        again.report.notices = program.report.notices
        program.module, program.passes, program.report = again.module, again.passes, again.report
        program.lowered.clear()
        module, report = concrete_module(program, inputs, self.options)
        if program is self.programs[0]:
            self.report = report
            self.after = ir.copy(module)[0] if program.symbolic else program.module
        plain, _ = ir.copy(module)
        for name in dict.fromkeys((backend, "aten")):
            made = lower(program, ir.copy(plain)[0], plugins.backend(name), self.packed, self.options)
            verdict = self._judged(made, expected, inputs)
            if verdict.ok:
                return made, verdict
        raise VerificationError(f"the compiled model gives another answer: {verdict.reason}", hint=_HINT)

    def _blamed(self, program: Program, expected: Sequence[Any], inputs: Inputs) -> list[PassResult]:
        """The passes that fail or change the answer: run one by one on the captured graph, with the shapes known."""

        def judge(module: fx.GraphModule) -> Verdict:
            return self._compare(expected, self._run_graph(ir.copy(module)[0], inputs), inputs)

        module, _ = ir.copy(program.captured.module)
        set_concrete_values(module, inputs.tensors)
        normalize.normalize(module)
        captured = judge(module)
        if not captured.ok:
            raise VerificationError(
                f"the captured graph gives another answer than the model: {captured.reason}", hint=_HINT
            )
        manager = PassManager(
            program.passes, numerics=self.options.numerics, strict=self.options.strict, judge=judge, each=True
        )
        return [result for result in manager.run(module).results if result.status not in KEPT]

    # -- tensors -----------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Unpacks what was emptied, for a caller who looks; from then on nothing is."""
        self.packed.restore()
        self.packed.shown = True

    def shared_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that must stay as they are, by name (see `held.shared`)."""
        return held.shared(self.original, self.programs, self.after)

    def shared_versions(self) -> tuple[tuple[torch.Tensor, int], ...]:
        """Each tensor that must stay as it is, and the version it has now."""
        return tuple((tensor, tensor._version) for tensor in self.shared_tensors().values())

    def refuse_discarded(self, who: str) -> None:
        """Raises UsageError where the original was discarded."""
        if self.discarded:
            raise UsageError(
                f"{who} the original model, which discard_original() let go",
                hint="make every call that is to come once before discarding, or compile the model again",
            )

    def discard(self) -> tuple[tuple[torch.Tensor, int], ...]:
        """Lets go of the original, of its captures and of what was rewritten: the specialisations stay as they are.

        Gives the tensors that those still read, and share with the caller, with their versions.
        """
        made = [lowered for program in self.programs for lowered in program.lowered.values()]
        read = {ir.place(tensor) for lowered in made for tensor in lowered.reads}
        kept = tuple((tensor, version) for tensor, version in self.shared_versions() if ir.place(tensor) in read)
        held.drop(self.programs, self.before, self.after)
        self.original, self.packed, self.discarded = torch.nn.Module(), Weights(), True
        return kept

    def converts(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether a conversion changes any tensor."""
        for tensor in (*self.original.parameters(), *self.original.buffers()):
            with torch.no_grad():
                after = fn(tensor)
            if (after.dtype, after.device) != (tensor.dtype, tensor.device):
                return True
        return False

    def convert(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Converts the private original (never the caller's) and forgets every program."""
        self.original = copy.deepcopy(self.original)
        self.original._apply(fn)
        symbolic = bool(self.programs) and self.programs[0].symbolic
        self.programs, self.packed, self.converted = [], Weights(), True
        self.start_empty([])
        if symbolic:
            self.start_symbolic()
        else:
            self.start_empty(["converted: the model is captured again at its next call"])

    def clone(self, memo: dict[int, Any]) -> Session:
        """An independent session with tensors of its own."""
        return Session.from_state(copy.deepcopy(self.state(), memo))

    def state(self) -> dict[str, Any]:
        """Everything but specialisations, which are made again: picklable where the original is."""
        from fxopt.frozen import freeze

        self.refuse_discarded("a copy needs")
        return freeze(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Session:
        """The session that `state` was taken of."""
        from fxopt.frozen import thaw

        return thaw(state)


_HINT = "this is a bug in fxopt or in a plugin; disable=(...) finds the pass, and a report is welcome"
