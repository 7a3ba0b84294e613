"""Studies: conf/study/NAME.yaml holds one from question to page; `study` runs it."""
