"""Studies of tickets: commands run step by step, their results read, and drawn into one HTML file.

`steps` runs commands once each, `results` reads what the frameworks leave behind, `plots` draws,
`page` writes self-contained HTML, and `report` is the report of ``make demo``. Importing this
package imports none of the frameworks.
"""
