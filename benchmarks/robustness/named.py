"""Mistakes that the tests once let live, made by hand: a piece of source, and what stands there instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """One mistake."""

    name: str
    module: str
    before: str
    """As it stands in the source, once."""
    after: str
    tests: tuple[str, ...]
    """Files, or tests, of which one must notice."""

    def line(self, source: str) -> int:
        """Where it lies, from 1. Raises ValueError: it is not there, or more than once."""
        if source.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: found {source.count(self.before)} times in {self.module}.py, expected once"
            )
        return source[: source.index(self.before)].count("\n") + 1

    def applied(self, source: str) -> str:
        """The source with the mistake. Raises ValueError, as `line`."""
        self.line(source)
        return source.replace(self.before, self.after)


NAMED: tuple[Named, ...] = (
    Named(
        "the mechanism is told who came, not who was asked",
        "federation/cohort",
        "num_replies=total.num, expected=len(self.ids), when=when",
        "num_replies=total.num, expected=total.num, when=when",
        ("federation/test_cohort.py",),
    ),
    Named(
        "a client's weight is honoured under central privacy",
        "federation/cohort",
        "1.0 if policy.uniform else self.weight(",
        "self.weight(",
        ("federation/test_cohort.py",),
    ),
    Named(
        "the quorum is over those who were asked",
        "federation/cohort",
        "len(answered) if len(asks) == len(self.ids) else len(set(self.ids) - set(self.failures))",
        "len(answered)",
        ("federation/test_cohort.py",),
    ),
    Named(
        "some kinds of failure end a run that skips failures",
        "federation/cohort",
        "        if not self._rules.skip_failures:",
        '        if not self._rules.skip_failures or "weights hash" in why:',
        ("federation/test_cohort.py", "methods/test_fedkseed.py"),
    ),
    Named(
        "the state is committed before the metrics",
        "runs/journal",
        """        self.add_line(metrics)
        self._note_states(cohort, server.round)
        tally = self.ledger.tally
        commit_file.write(
            self._folder,
            Commit(
                state=server.state,
                round=server.round,
                run=self.run,
                recipe=self._recipe,
                ledger=Lines(tally.num, tally.sha256),
                metrics=Lines(self._metrics.num, self._metrics.sha256),
                num_means=self._num_means + self.ledger.num_means,
                clients=self._clients,
            ),
        )
""",
        """        self._note_states(cohort, server.round)
        tally = self.ledger.tally
        commit_file.write(
            self._folder,
            Commit(
                state=server.state,
                round=server.round,
                run=self.run,
                recipe=self._recipe,
                ledger=Lines(tally.num, tally.sha256),
                metrics=Lines(self._metrics.num, self._metrics.sha256),
                num_means=self._num_means + self.ledger.num_means,
                clients=self._clients,
            ),
        )
        self.add_line(metrics)
""",
        ("runs/test_journal.py", "runs/test_rounds.py"),
    ),
    Named(
        "what was not committed is cut one round too late",
        "runs/resuming",
        "if not isinstance(round, int) or round <= last_round:",
        "if not isinstance(round, int) or round < last_round:",
        ("runs/test_resuming.py",),
    ),
    Named(
        "no scores where a method is done early",
        "runs/rounds",
        " or number == recipe.rounds or method.done(server):",
        " or number == recipe.rounds:",
        ("runs/test_rounds.py",),
    ),
    Named(
        "the same batches in every round",
        "models/training",
        "    first = (round - 1) * steps\n",
        "    first = 0\n",
        ("models/test_training.py",),
    ),
    Named(
        "macro-F1 without classes that are only guessed",
        "models/evaluation",
        "sorted(labels.keys() | predictions.keys())",
        "sorted(labels.keys())",
        ("models/test_evaluation.py",),
    ),
    Named(
        "a central batch of all clients, whatever the cohort",
        "runs/baselines",
        "times=recipe.cohort or len(shares)",
        "times=len(shares)",
        ("runs/test_baselines.py",),
    ),
    Named(
        "of a seed that is drawn twice, the last gradient counts",
        "zeroth/two_point",
        "sums[k] += gradient",
        "sums[k] = gradient",
        ("zeroth/test_two_point.py",),
    ),
    Named(
        "a client that failed is noted as up to date",
        "methods/fedkseed",
        "NOTHING if client in clients.failures else held",
        "held",
        ("methods/test_fedkseed.py::test_a_client_that_failed_is_sent_all_that_it_may_have_missed",),
    ),
    Named(
        "clients of KD weigh alike",
        "methods/kd",
        'weight = fitted.num_examples if self.client_weighting == "examples" else 1',
        "weight = 1",
        ("methods/test_kd.py::test_a_clients_scores_count_by_the_examples_it_trained_on",),
    ),
    Named(
        "KD's server distils into what the last client left in its model",
        "methods/kd",
        "        loading.write_trained(server.model, wire.shared(server.state))  # In-process clients use the same model.\n",
        "",
        ("methods/test_kd.py::test_the_servers_model_is_its_own_again_after_clients_of_the_same_process",),
    ),
    Named(
        "copies of the server's part are averaged without weights",
        "split/server_half",
        "total.add(Payload(self._learners[client].read()), weights[client])",
        "total.add(Payload(self._learners[client].read()), 1.0)",
        ("split/test_server_half.py",),
    ),
    Named(
        "parts of split clients are averaged without weights",
        "methods/split",
        '"weight": examples if self.client_weighting == "examples" else 1.0',
        '"weight": 1.0',
        ("methods/test_split.py::test_clients_count_by_the_examples_they_trained_on",),
    ),
    Named(
        "every server phase teaches the same stretch of rows",
        "methods/fedpt",
        "        first = (phase - 1) * self.steps\n",
        "        first = 0\n",
        ("methods/test_fedpt.py::test_each_server_phase_teaches_the_next_stretch_of_rows",),
    ),
    Named(
        "a header that kilofed would not write is read",
        "payload",
        "if _make_header(layout, num_text) != header:",
        "if len(_make_header(layout, num_text)) != len(header):",
        ("test_payload.py",),
    ),
    Named(
        "bytes depend on the order in which scalars were set",
        "payload",
        "json.dumps(words, sort_keys=True,",
        "json.dumps(words,",
        ("test_payload.py",),
    ),
    Named(
        "a level that float32 cannot hold is taken",
        "zeroth/codec",
        "if largest > MAX_LEVEL or",
        "if largest > (1 << 25) + 1 or",
        ("zeroth/test_codec.py",),
    ),
    Named(
        "a coarser grid rounds down",
        "zeroth/codec",
        "return levels + (1 << (shift - 1)) >> shift",
        "return levels >> shift",
        ("zeroth/test_codec.py",),
    ),
    Named(
        "a line is told before it is on the disk",
        "files",
        """        file.write(json.dumps(row, separators=(",", ":")) + "\\n")
        file.flush()
        os.fsync(file.fileno())
""",
        """        file.write(json.dumps(row, separators=(",", ":")) + "\\n")
        file.flush()
""",
        ("test_files.py",),
    ),
    Named(
        "the stop string that is listed first ends a text",
        "generation/detokenizer",
        "return self._held[: min(starts)]",
        "return self._held[: starts[0]]",
        ("generation/test_detokenizer.py",),
    ),
    Named(
        "epsilon counts every exchange",
        "federation/ledger",
        '        if row.verb == "mean":\n            self._means',
        "        if row.verb:\n            self._means",
        ("federation/test_ledger.py",),
    ),
    Named(
        "costs are shown as measured by forecast",
        "reports/report",
        "fixed(first / second) if second",
        "fixed(second / first) if first",
        ("reports/test_report.py",),
    ),
    Named(
        "a quorum of the whole cohort is refused",
        "config/recipe",
        "self.quorum > self.cohort",
        "self.quorum >= self.cohort",
        ("config/test_recipe.py",),
    ),
    Named(
        "a quorum of all clients is refused",
        "runs/sites",
        "if recipe.quorum > number:",
        "if recipe.quorum >= number:",
        ("runs/test_sites.py",),
    ),
)
