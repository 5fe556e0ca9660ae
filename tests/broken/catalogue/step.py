"""Faults of one step: clip, influence of a unit, noise, sampling."""

from __future__ import annotations

from tests.broken.catalogue.fault import (
    CLIPPED,
    FRESH,
    LOOP,
    NOISE_ONCE,
    PER_UNIT,
    POISONED,
    POISSON,
    REFUSALS,
    REPLAY,
    SCALE,
    TWO_RANKS,
    Fault,
)

CLIP: list[Fault] = [
    Fault(
        "clip",
        "no clip at all",
        "dprlhf_ray/privacy/clipping.py",
        "(self.clip_norm / norms.clamp_min(1e-30)).clamp(max=1.0)",
        "torch.ones_like(norms)",
        CLIPPED,
    ),
    Fault(
        "clip",
        "clips to 2 C",
        "dprlhf_ray/privacy/clipping.py",
        "(self.clip_norm / norms",
        "(2 * self.clip_norm / norms",
        CLIPPED,
    ),
    Fault(
        "clip",
        "each parameter is clipped by itself",
        "dprlhf_ray/privacy/clipping.py",
        "+= (factor @ f).double()",
        "+= (((self.clip_norm / f.norm(dim=1).clamp_min(1e-30)).clamp(max=1.0) * usable) @ f).double()",
        CLIPPED,
    ),
    Fault(
        "clip",
        "0 * NaN is not masked",
        "dprlhf_ray/privacy/clipping.py",
        "if bad:  # 0 * NaN is NaN",
        "if False:",
        POISONED,
    ),
    Fault(
        "clip",
        "a gradient that is not finite is used",
        "dprlhf_ray/privacy/clipping.py",
        "usable = valid & torch.isfinite(norms)",
        "usable = valid",
        POISONED,
    ),
    Fault(
        "clip",
        "padding units count",
        "dprlhf_ray/privacy/clipping.py",
        "usable = valid & torch.isfinite(norms)",
        "usable = torch.isfinite(norms)",
        (FRESH + "test_a_null_or_padding_unit_adds_exactly_zero",),
    ),
    Fault(
        "clip",
        "the value head is left out of the norm",
        "dprlhf_ray/privacy/clipping.py",
        "for f in flat if f is not None)",
        "for f in flat[:-2] if f is not None)",
        (REPLAY + "test_nulling_a_unit_removes_its_own_clipped_gradient_and_nothing_else[ppo-lora-0.001]",),
    ),
    Fault(
        "clip",
        "metrics' bound forgets that they are several",
        "dprlhf_ray/stages/metrics.py",
        "return len(self.scales) ** 0.5",
        "return 1.0",
        (REPLAY + "test_nulling_a_unit_removes_its_own_clipped_gradient_and_nothing_else[rloo-lora-0.001]",),
    ),
]

UNITS: list[Fault] = [
    Fault(
        "per-unit gradient",
        "a layer that mixes records is accepted",
        "dprlhf_ray/privacy/per_unit.py",
        "if isinstance(module, _COUPLING):",
        "if False:",
        (PER_UNIT + "test_a_layer_that_mixes_records_is_refused_by_name",),
    ),
    Fault(
        "fail closed",
        "a raw gradient is left in .grad",
        "dprlhf_ray/privacy/per_unit.py",
        "        grad = grad.float()\n",
        "        grad = grad.float()\n        parameter.grad = grad.sum(0)\n",
        (PER_UNIT + "test_recorded_gradients_equal_one_record_autograd",),
    ),
    Fault(
        "fail closed",
        "what the optimizer holds is not compared",
        "dprlhf_ray/actors/learner.py",
        "if held is None or not torch.allclose(",
        "if False and not torch.allclose(",
        (REFUSALS + "test_the_noised_gradient_is_applied_and_no_other",),
    ),
    Fault(
        "failures",
        "one record's NaN drops its micro-batch",
        "dprlhf_ray/stages/objective.py",
        "                grads = self.recorder.take()\n",
        "                grads = self.recorder.take()\n"
        "                if not torch.isfinite(loss).all():\n                    continue\n",
        (REPLAY + "test_a_record_that_fails_contributes_zero_and_touches_nobody",),
    ),
    Fault(
        "failures",
        "a NaN step is skipped in silence",
        "dprlhf_ray/actors/learner.py",
        'raise WriteCheckFailed("the noised gradient is not finite; nothing was applied")',
        "return",
        (REFUSALS + "test_a_noised_gradient_that_is_not_finite_fails_loudly",),
    ),
    Fault(
        "failures",
        "an empty draw is no step",
        "dprlhf_ray/actors/learner.py",
        "            self._write_and_step(value /",
        "            if draw.batches: self._write_and_step(value /",
        NOISE_ONCE,
    ),
    Fault(
        "failures",
        "a bad record is quoted in an error",
        "dprlhf_ray/data/formats.py",
        "        except Exception:  # whatever a record's content does",
        '        except Exception:\n            raise ValueError(f"bad record {row!r}") from None\n'
        "        except KeyError:  #",
        ("tests/data/test_sources.py::test_bad_records_become_null_in_their_own_slot_and_leave_the_others_alone",),
    ),
    Fault(
        "failures",
        "a scorer's error is logged with its text",
        "dprlhf_ray/stages/scoring.py",
        "    except Exception:  # a user's function may raise anything",
        "    except Exception as e:\n        print(e)\n        return None\n    except KeyError:  #",
        ("tests/stages/test_scoring.py::test_one_failing_record_gives_none_and_leaves_the_others_and_the_log_alone",),
    ),
    Fault(
        "failures",
        "rewards are not bounded",
        "dprlhf_ray/stages/scoring.py",
        "max(-bound, min(bound, value))",
        "value",
        ("tests/stages/test_scoring.py::test_one_failing_record_gives_none_and_leaves_the_others_and_the_log_alone",),
    ),
]

NOISE: list[Fault] = [
    Fault(
        "noise",
        f"deviation on the sum {name}",
        "dprlhf_ray/privacy/permit.py",
        "return self.sigma * self.clip_norm",
        f"return {wrong}",
        SCALE,
    )
    for name, wrong in [
        ("forgets C", "self.sigma"),
        ("sigma C / sqrt K", "self.sigma * self.clip_norm / self.updates**0.5"),
        ("2/3 of it", "self.sigma * self.clip_norm * 2 / 3"),
        ("3/2 of it", "self.sigma * self.clip_norm * 3 / 2"),
        ("sqrt 2 of it", "self.sigma * self.clip_norm * 2**0.5"),
    ]
] + [
    Fault(
        "noise",
        "follows torch's seed, which the config sets",
        "dprlhf_ray/privacy/noise.py",
        "secrets.randbits(256)",
        "torch.initial_seed()",
        (PER_UNIT + "test_noise_does_not_follow_the_seed",),
    ),
    Fault("noise", "one key for all releases", "dprlhf_ray/privacy/noise.py", "secrets.randbits(256)", "7", SCALE),
    Fault(
        "noise",
        "keys of 32 bits",
        "dprlhf_ray/privacy/noise.py",
        "secrets.randbits(256)",
        "secrets.randbits(32)",
        (FRESH + "test_keys_have_128_bits_of_the_operating_system_each_time",),
    ),
    Fault(
        "noise",
        "each rank adds its own",
        "dprlhf_ray/actors/learner.py",
        "            dist.broadcast(value, 0)\n",
        "            if self.rank:\n                value = noise_gradient(0 * total.total, redeem()).value\n"
        "            dist.all_reduce(value)\n",
        NOISE_ONCE,
    ),
    Fault(
        "noise",
        "averaged over the ranks",
        "dprlhf_ray/actors/learner.py",
        "            dist.broadcast(value, 0)\n",
        "            value = value if self.rank == 0 else 0 * total.total\n"
        "            dist.all_reduce(value)\n            value /= self.world\n",
        NOISE_ONCE,
    ),
    Fault(
        "noise",
        "metrics are noised for one entry only",
        "dprlhf_ray/actors/learner.py",
        "noise_metrics(metrics, permit, own.bound)",
        "noise_metrics(metrics, permit, 1.0)",
        (REFUSALS + "test_metrics_are_noised_for_their_joint_bound_and_divided_by_the_public_batch",),
    ),
    Fault(
        "divide",
        "by the realised batch",
        "dprlhf_ray/actors/learner.py",
        "self._write_and_step(value / self.spec.step.expected_batch)",
        "self._write_and_step(value / max(1, len(experiences)))",
        NOISE_ONCE,
    ),
    Fault(
        "noise",
        "random-number states are in checkpoints",
        "dprlhf_ray/actors/learner.py",
        'tag="state", exclude_frozen_parameters=True',
        'tag="state", client_state={"state": torch.get_rng_state()}, exclude_frozen_parameters=True',
        ("tests/actors/test_checkpoint.py::test_a_checkpoint_holds_released_values_only",),
    ),
]

SAMPLING: list[Fault] = [
    Fault(
        "sampling",
        "a fixed number without replacement",
        "dprlhf_ray/privacy/sampling.py",
        "np.flatnonzero(generator.random(population) < sampling_rate)",
        "np.sort(generator.permutation(population)[: round(population * sampling_rate)])",
        POISSON,
    ),
    Fault(
        "sampling",
        "one seed",
        "dprlhf_ray/privacy/sampling.py",
        "secrets.randbits(256)",
        "0",
        POISSON,
    ),
    Fault(
        "sampling",
        "a counter that starts again with the process",
        "dprlhf_ray/privacy/sampling.py",
        "secrets.randbits(256)",
        'poisson_draw.__dict__.__setitem__("n", poisson_draw.__dict__.get("n", 0) + 1) or poisson_draw.__dict__["n"]',
        (FRESH + "test_a_restart_draws_nobody_again",),
    ),
    Fault(
        "sampling",
        "a unit is dropped when ranks share unevenly",
        "dprlhf_ray/stages/batching.py",
        "list(ordered[r::ranks])",
        "list(ordered[r : len(ordered) // ranks * ranks : ranks])",
        TWO_RANKS,
    ),
    Fault(
        "sampling",
        "the second half of a draw waits for the next one",
        "dprlhf_ray/stage_run.py",
        "for u in drawn]",
        "for u in drawn[: len(drawn) // 2]]",
        (LOOP + "test_everybody_who_was_drawn_takes_part_and_nobody_else",),
    ),
]
