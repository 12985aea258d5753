"""Studies of tickets: commands run step by step, their results read, judged, and drawn into HTML.

`steps` runs commands once each, `results` reads what the frameworks leave behind, and `runs` what
has become of a study's. `verdict` decides what is matching; `similarity`, `structure` and `perturb`
are about masks. `plots` and `mask_plots` draw, `tables` and `page` write, and `report` and
`study_report` are the reports of ``make demo`` and of a study. Importing this package imports none
of the frameworks.
"""
