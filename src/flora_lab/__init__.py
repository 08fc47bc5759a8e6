"""The laboratory: methods against methods, on tasks, with rows to tables and figures. `flora` never imports it."""
