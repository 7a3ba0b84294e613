"""One run: modules, task, trainer, callbacks, loggers, doctor, studies."""
