"""Faults that make the printed epsilon untrue, one line each, and the tests that must fail under them.

`rule` is the section of docs/guarantee.md that the fault breaks. `old` occurs exactly once in `file`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """tests: pytest node ids, the fastest that see it."""

    rule: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PER_UNIT = "tests/privacy/test_per_unit.py::"
ACCOUNTING = "tests/privacy/test_accounting.py::"
LEDGER = "tests/privacy/test_ledger.py::"
PERMIT = "tests/privacy/test_permit.py::"
FRESH = "tests/privacy/test_durable_and_fresh.py::"
LOSSES = "tests/algorithms/test_losses.py::"
REPLAY = "tests/stages/test_neighbour_replay.py::"
LOOP = "tests/test_stage_loop.py::"
REFUSALS = "tests/actors/test_learner_refusals.py::"
LEARNER = "tests/actors/test_learner.py::"
CERTIFICATE = "tests/privacy/test_certificate.py::"
PUBLIC = "tests/privacy/test_public_stages.py::"
BUDGET = "tests/privacy/test_ledger_budget.py::"
PLANNING = "tests/privacy/test_planning.py::"

CLIPPED = (PER_UNIT + "test_clipped_sum_is_the_sum_of_clipped_vectors_over_all_parameters",)
POISONED = (PER_UNIT + "test_a_poisoned_unit_moves_the_sum_by_at_most_c",)
SCALE = (PER_UNIT + "test_noise_has_the_scale_that_is_charged_and_no_other",)
POISSON = (PER_UNIT + "test_sampling_is_poisson",)
NOISE_ONCE = (LEARNER + "test_noise_is_added_once_whatever_the_ranks_and_the_stage[0]",)
TWO_RANKS = (LEARNER + "test_two_ranks_make_the_same_update_at_every_zero_stage[0]",)

_CLIP = [
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

_PER_UNIT = [
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

_NOISE = [
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

_SAMPLING = [
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

_CHARGE = [
    Fault(
        "charge first",
        "the draw comes before the charge",
        "dprlhf_ray/stage_run.py",
        "    reserved = ray.get(",
        "    draw(data, plan)\n    reserved = ray.get(",
        (LOOP + "test_nothing_private_is_touched_before_its_charge_is_on_disk",),
    ),
    Fault(
        "charge first",
        "the permit comes without a charge",
        "dprlhf_ray/actors/accountant.py",
        "charge = self._ledger.charge(stage, step)",
        'charge = type("C", (), {"attempt": self._ledger.spent(stage) + 1, "step": self._ledger.schedule(stage).step})',
        (PERMIT + "test_the_accountant_charges_before_it_permits_and_forgets_permits_not_charges",),
    ),
    Fault(
        "charge first",
        "a retry makes the same attempt again",
        "dprlhf_ray/stage_run.py",
        "    reserved = ray.get(",
        "    _prepare.kept = reserved = getattr(_prepare, 'kept', None) or ray.get(",
        (LOOP + "test_an_attempt_that_died_is_charged_again_with_a_new_draw_rollout_and_permit",),
    ),
    Fault(
        "permit",
        "used more than K times",
        "dprlhf_ray/privacy/permit.py",
        "self.updates_left -= 1",
        "pass",
        (PERMIT + "test_a_permit_carries_what_was_charged_and_is_used_k_times",),
    ),
    Fault(
        "permit",
        "redeemed by another message too",
        "dprlhf_ray/privacy/permit.py",
        "elif issued.message_id != message_id:",
        "elif False:",
        (PERMIT + "test_only_the_same_message_gets_the_same_answer",),
    ),
    Fault(
        "permit",
        "not bound to the incarnation",
        "dprlhf_ray/privacy/permit.py",
        "if issued is None or incarnation != issued.permit.incarnation or incarnation != self._current:",
        "if issued is None:",
        (PERMIT + "test_only_the_same_message_gets_the_same_answer",),
    ),
    Fault(
        "permit",
        "a replaced learner may come back",
        "dprlhf_ray/privacy/permit.py",
        "self._retired.add(self._current)",
        "pass",
        (PERMIT + "test_a_replaced_learner_is_refused_and_its_permits_are_void",),
    ),
    Fault(
        "permit",
        "its token follows from the attempt",
        "dprlhf_ray/privacy/permit.py",
        "token = secrets.token_hex(16)",
        'token = f"{stage}/{attempt}"',
        (PERMIT + "test_tokens_do_not_repeat_for_the_same_attempt",),
    ),
    Fault(
        "permit",
        "its token is shown",
        "dprlhf_ray/privacy/permit.py",
        "token: str = field(repr=False)",
        "token: str",
        (PERMIT + "test_a_permit_carries_what_was_charged_and_is_used_k_times",),
    ),
]

_ACCOUNTING = [
    Fault(
        "accounting",
        "K updates are charged as one",
        "dprlhf_ray/privacy/mechanism.py",
        "precision = self.updates_per_draw * self.noise_multiplier**-2",
        "precision = self.noise_multiplier**-2",
        (ACCOUNTING + "test_updates_on_one_draw_are_one_subsampled_gaussian_with_less_noise",),
    ),
    Fault(
        "accounting",
        "the metrics cost nothing",
        "dprlhf_ray/privacy/mechanism.py",
        "precision += self.metric_noise_multiplier**-2",
        "pass",
        (ACCOUNTING + "test_metrics_are_charged_once_per_draw",),
    ),
    Fault(
        "accounting",
        "replace_one is accounted as add or remove",
        "dprlhf_ray/privacy/accounting.py",
        '"replace_one": NeighboringRelation.REPLACE_ONE',
        '"replace_one": NeighboringRelation.ADD_OR_REMOVE_ONE',
        (ACCOUNTING + "test_epsilon_is_the_reference_figure_under_each_adjacency",),
    ),
    Fault(
        "accounting",
        "delta of exactly 1/N is accepted",
        "dprlhf_ray/privacy/accounting.py",
        "if delta * population >= 1 and",
        "if delta * population > 1 and",
        (ACCOUNTING + "test_delta_of_one_record_is_refused_without_an_override",),
    ),
    Fault(
        "accounting",
        "NaN and infinite numbers are accepted",
        "dprlhf_ray/privacy/mechanism.py",
        "not math.isfinite(value) or value <= 0",
        "value <= 0",
        (ACCOUNTING + "test_nonsense_is_refused_in_every_number",),
    ),
    Fault(
        "accounting",
        "a missing epsilon means no limit (config)",
        "dprlhf_ray/config.py",
        'if self.mode == "dp" and self.epsilon is None:',
        "if False:",
        ("tests/test_config.py::test_bad_values_are_one_line_that_names_key_fault_and_remedy",),
    ),
]

_LEDGER = [
    Fault(
        "ledger",
        "commits are not synchronised",
        "dprlhf_ray/privacy/store.py",
        "PRAGMA synchronous=EXTRA",
        "PRAGMA synchronous=OFF",
        (FRESH + "test_a_charge_is_synchronised_before_it_is_acknowledged",),
    ),
    Fault(
        "ledger",
        "a missing epsilon means no limit",
        "dprlhf_ray/privacy/budget.py",
        "    if epsilon is None:\n",
        "    epsilon = 1e9 if epsilon is None else epsilon\n    if False:\n",
        (LEDGER + "test_what_was_not_declared_or_is_not_sound_is_refused",),
    ),
    Fault(
        "ledger",
        "a schedule may cost a little more than its target",
        "dprlhf_ray/privacy/budget.py",
        "if planned.pld > epsilon * ROUNDING:",
        "if planned.pld > epsilon * 1.05:",
        (FRESH + "test_a_target_is_kept_to_its_last_digits",),
    ),
    Fault(
        "ledger",
        "one attempt more than planned",
        "dprlhf_ray/privacy/chain.py",
        "return self.spent < self.step.steps",
        "return self.spent <= self.step.steps",
        (LEDGER + "test_a_schedule_gets_exactly_its_attempts_also_over_a_restart",),
    ),
    Fault(
        "ledger",
        "the keyed hash does not cover the body",
        "dprlhf_ray/privacy/chain.py",
        "json.dumps(parts, separators",
        "json.dumps(parts[:5] + parts[6:], separators",
        (FRESH + "test_parameters_that_are_changed_in_place_are_refused",),
    ),
    Fault(
        "ledger",
        "an older writer goes on from the newer one's state",
        "dprlhf_ray/privacy/ledger.py",
        "                mine = (1,",
        "                self._state.seq, self._state.epoch, self._state.head = row.seq, row.epoch, row.head\n"
        "                mine = (1,",
        (LEDGER + "test_an_older_writer_is_fenced",),
    ),
    Fault(
        "ledger",
        "where the chain must end is not checked (lost tail)",
        "dprlhf_ray/privacy/ledger_view.py",
        "    if len(rows) != 1 or not hmac.compare_digest(",
        "    if False and not hmac.compare_digest(",
        (LEDGER + "test_a_lost_tail_a_hole_or_a_forged_state_is_refused",),
    ),
    Fault(
        "ledger",
        "heads recorded elsewhere are ignored",
        "dprlhf_ray/privacy/chain.py",
        "    for where in missing.values():",
        "    for where in ():",
        (LEDGER + "test_a_rollback_to_an_older_copy_is_refused_where_a_recorded_head_can_tell",),
    ),
    Fault(
        "ledger",
        "a schedule is declared anew with other parameters",
        "dprlhf_ray/privacy/ledger.py",
        "if not d.matches(known[d.stage]):",
        "if False:",
        (LEDGER + "test_what_was_not_declared_or_is_not_sound_is_refused",),
    ),
]

_COUPLING = [
    Fault(
        "coupling",
        "GRPO's deviation is that of the batch",
        "dprlhf_ray/algorithms/grpo.py",
        "rewards.std(1, keepdim=True)",
        "rewards.std()",
        (LOSSES + "test_grpo_normalises_within_a_group_only",),
    ),
    Fault(
        "coupling",
        "advantages are whitened over the batch",
        "dprlhf_ray/algorithms/reinforce.py",
        "return self.policy_loss(batch, advantages.unsqueeze(-1))",
        "return self.policy_loss(batch, ((advantages - advantages.mean()) / advantages.std()).unsqueeze(-1))",
        (LOSSES + "test_a_units_loss_depends_on_that_unit_only",),
    ),
    Fault(
        "coupling",
        "PPO's advantages are centred over the batch",
        "dprlhf_ray/algorithms/ppo.py",
        "return self.policy_loss(batch, advantages)",
        "return self.policy_loss(batch, advantages - advantages.mean())",
        (LOSSES + "test_a_units_loss_depends_on_that_unit_only",),
    ),
    Fault(
        "coupling",
        "RLOO's baseline crosses prompts",
        "dprlhf_ray/algorithms/rloo.py",
        "return group_centred(rewards) * ",
        "return (rewards - rewards.mean()) * ",
        (LOSSES + "test_a_units_loss_depends_on_that_unit_only",),
    ),
    Fault(
        "coupling",
        "the baseline is the batch's mean reward",
        "dprlhf_ray/algorithms/reinforce.py",
        "self.rewards(batch) - batch.baseline",
        "self.rewards(batch) - self.rewards(batch).mean()",
        (LOSSES + "test_a_units_loss_depends_on_that_unit_only",),
    ),
    Fault(
        "coupling",
        "the next baseline is the draw's own mean reward",
        "dprlhf_ray/stage_run.py",
        '            baseline = next((r.value for r in released if r.name == "private/reward"), baseline)\n',
        "            own = [r.reveal() for unit in drawn.units for e in unit for r in e.rewards if r is not None]\n"
        "            baseline = sum(own) / max(1, len(own))\n",
        (LOOP + "test_the_baseline_is_a_released_value_never_that_of_the_draw",),
    ),
    Fault(
        "coupling",
        "a loss is divided by the batch's tokens",
        "dprlhf_ray/algorithms/base.py",
        "mask.sum(-1).clamp_min(1.0)",
        "mask.sum().clamp_min(1.0)",
        (LOSSES + "test_reinforce_gradient_is_minus_advantage_over_length",),
    ),
    Fault(
        "coupling",
        "completions of another weight version are learned from",
        "dprlhf_ray/actors/learner.py",
        "            if not 0 <= self.version - c.version <= bound or (bound and c.log_probs is None):\n",
        "            if c.log_probs is None and bound:\n",
        (REFUSALS + "test_completions_of_another_weight_version_are_refused",),
    ),
    Fault(
        "coupling",
        "new weights reach the fleet as soon as they are there, in the middle of draws ahead",
        "dprlhf_ray/stage_run.py",
        "lane.run(lambda weights=weights: _sync(roles, *weights))",
        "lane.run(lambda done=_sync(roles, *weights): done)",
        (LOOP + "test_which_weights_answer_a_draw_goes_by_its_number_and_not_by_the_clock",),
    ),
    Fault(
        "coupling",
        "importance weights of stale completions are left out",
        "dprlhf_ray/stages/rl.py",
        "behaviour_log_probs=_known(batch.behaviour, old_log_probs)",
        "behaviour_log_probs=None",
        (REPLAY + "test_completions_of_older_weights_weigh_as_their_own_ratio_says",),
    ),
    Fault(
        "coupling",
        "an engine samples with a constant seed",
        "dprlhf_ray/actors/engines/base.py",
        "self._key_sampler(os.urandom(STATE_BYTES))",
        "self._key_sampler(bytes(STATE_BYTES - 1) + b'1')",
        ("tests/actors/test_engine_seed.py::test_an_engine_that_starts_again_draws_something_else",),
    ),
]

_RELEASES = [
    Fault(
        "released",
        "metrics take a private value",
        "dprlhf_ray/observability/metrics.py",
        "        only(Released, values)\n",
        '        values = [v if isinstance(v, Released) else Released("raw", 0.25, "config") for v in values]\n',
        (
            "tests/observability/test_metrics.py::"
            "test_a_value_that_was_not_released_is_refused_and_nothing_of_its_step_is_written",
        ),
    ),
    Fault(
        "released",
        "a private value can be shown",
        "dprlhf_ray/privacy/private.py",
        'return "<private>"',
        "return str(vars(self))",
        ("tests/privacy/test_private.py::test_a_private_value_cannot_be_shown",),
    ),
    Fault(
        "certificate",
        "certified without noise",
        "dprlhf_ray/privacy/certificate.py",
        '"certified": not void,',
        '"certified": True,',
        (CERTIFICATE + "test_clip_only_is_never_certified_and_has_no_epsilon_anywhere",),
    ),
    Fault(
        "certificate",
        "the cumulative epsilon leaves other runs out",
        "dprlhf_ray/actors/accountant.py",
        "if s.dataset == dataset and not s.public and (s.stage in units or not this_run_only):",
        "if s.dataset == dataset and not s.public and s.stage in units:",
        (PERMIT + "test_the_accountant_charges_before_it_permits_and_forgets_permits_not_charges",),
    ),
    Fault(
        "composition",
        "stages that share a unit are taken as parallel",
        "dprlhf_ray/privacy/composition.py",
        "readers.setdefault(digest, set()).add(i)",
        "readers[digest] = {i}",
        ("tests/privacy/test_composition.py::test_stages_that_share_one_single_unit_are_composed_sequentially",),
    ),
    Fault(
        "composition",
        "stages without ids are taken as disjoint",
        "dprlhf_ray/privacy/composition.py",
        "unknown = frozenset(i for i in everything if parts[i].units is None)",
        "unknown = frozenset[int]()",
        ("tests/privacy/test_composition.py::test_a_stage_without_ids_counts_for_everybody_and_the_reason_says_so",),
    ),
]

_PUBLIC = [
    Fault(
        "public",
        "a data set is private and public under one name",
        "dprlhf_ray/privacy/budget.py",
        "        if s.public != public:\n",
        "        if False:\n",
        (PUBLIC + "test_a_data_set_is_never_private_and_public_under_one_name",),
    ),
    Fault(
        "public",
        "a data set with a budget is declared public",
        "dprlhf_ray/privacy/budget.py",
        "    if public and budget is not None:\n",
        "    if False:\n",
        (PUBLIC + "test_a_data_set_with_a_budget_is_private",),
    ),
    Fault(
        "public",
        "a private stage is declared as a public one",
        "dprlhf_ray/privacy/budget.py",
        "        if epsilon is not None or step.noise_multiplier != 0 or d.adaptive:\n",
        "        if False:\n",
        (PUBLIC + "test_what_has_a_target_or_noise_is_not_declared_as_public",),
    ),
    Fault(
        "public",
        "replay lets one data set be private and public",
        "dprlhf_ray/privacy/chain.py",
        "        if any(s.public != schedule.public for",
        "        if False and any(s.public != schedule.public for",
        (PUBLIC + "test_what_was_declared_public_is_covered_by_the_chain",),
    ),
    Fault(
        "public",
        "a public stage is composed with private ones",
        "dprlhf_ray/actors/accountant.py",
        "if s.dataset == dataset and not s.public and (",
        "if s.dataset == dataset and (",
        (PUBLIC + "test_a_public_stage_is_counted_and_resumed_and_costs_nothing",),
    ),
    Fault(
        "public",
        "a public stage voids the certificate",
        "dprlhf_ray/privacy/certificate.py",
        'for p in plans if p.guarantee == "none"',
        "for p in plans if p.target is None",
        (CERTIFICATE + "test_a_public_stage_costs_nothing_voids_nothing_and_is_named",),
    ),
    Fault(
        "public",
        "a run with a public stage is not voided by a control",
        "dprlhf_ray/privacy/certificate.py",
        'for p in plans if p.guarantee == "none"',
        'for p in plans if p.guarantee == "none" and not any(q.public for q in plans)',
        (CERTIFICATE + "test_a_public_stage_does_not_make_up_for_a_control",),
    ),
    Fault(
        "certificate",
        "a reward model of this run counts as public",
        "dprlhf_ray/privacy/statements.py",
        'if s.kind != "ensemble" and not s.stage}',
        'if s.kind != "ensemble"}',
        (CERTIFICATE + "test_scorers_are_public_or_post_processing_or_leave_the_cluster",),
    ),
    Fault(
        "certificate",
        "nobody is told that texts are sent to a scorer",
        "dprlhf_ray/privacy/statements.py",
        "return [*_EXCLUDED, *away, ",
        "return [*_EXCLUDED, ",
        (CERTIFICATE + "test_scorers_are_public_or_post_processing_or_leave_the_cluster",),
    ),
]

_STAGES = [
    Fault(
        "charge",
        "the stages of a run are recorded one by one, before the later ones are checked",
        "dprlhf_ray/privacy/ledger.py",
        'new.append(("schedule", d.dataset, d.stage, body))',
        'self._append(("schedule", d.dataset, d.stage, body))',
        (BUDGET + "test_of_the_stages_of_a_run_all_are_declared_or_none",),
    ),
    Fault(
        "charge",
        "each stage of a run is checked as if it were alone",
        "dprlhf_ray/privacy/ledger.py",
        "                known[d.stage] = chain.scheduled(d.dataset, d.stage, body)\n",
        "",
        (BUDGET + "test_of_the_stages_of_a_run_all_are_declared_or_none",),
    ),
    Fault(
        "users",
        "the population of users is counted in records",
        "dprlhf_ray/data/units.py",
        'users = privacy.unit == "user" and privacy.records_per_user is None',
        "users = False",
        (PLANNING + "test_users_are_counted_as_users",),
    ),
]

FAULTS: tuple[Fault, ...] = tuple(
    _CLIP + _PER_UNIT + _NOISE + _SAMPLING + _CHARGE + _ACCOUNTING + _LEDGER + _COUPLING + _RELEASES + _PUBLIC + _STAGES
)
