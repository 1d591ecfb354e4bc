"""Real parts and fakes for tests: registries to pull from, faulty sources, conformance suites. May import everything; only
tests and `p2pgz demo` import it."""
