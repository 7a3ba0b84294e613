"""Reports on finished runs, from their records alone: collect, frame, tests, words and figures."""
