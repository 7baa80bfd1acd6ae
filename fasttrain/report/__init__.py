"""One self-contained HTML page of runs, evaluations and papers::

    paths -> collect (files -> Found) -> runs, series, results, environments (Found -> plain values) -> page (-> HTML)

It reads what other commands wrote and knows no tensor. What is in the page is in ``templates/``.
"""
