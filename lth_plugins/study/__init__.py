"""Studies of tickets: commands run step by step, their results read, judged, and drawn into HTML.

`steps` runs commands once each, and `results` reads what the frameworks leave behind. Of a study,
`config` says what can be set, `plan` makes runs of that, `tasks` knows the tools, `sweep` runs
them, `runs` reads what has become of them, and `status` sums that up. `verdict` decides what is
matching; `similarity`, `structure` and `perturb` are about masks. `plots` and `mask_plots` draw,
`tables` and `page` write, and `report` and `study_report` are the reports of ``make demo`` and of a
study. Importing this package imports none of the frameworks.
"""
