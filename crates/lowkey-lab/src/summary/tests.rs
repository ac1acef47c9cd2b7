use super::*;
use crate::fixtures::study;
use crate::report::report;

/// Where seeds differ far more than arms, pairs still tell the arms apart; unpaired means could not.
#[test]
fn differences_are_taken_in_pairs() {
    let rule = Rule::Margin { margin: 0.0, confidence: 0.95 };
    let summary =
        study(rule, &[("base", None, &[1.0, 2.0, 3.0, 4.0]), ("other", None, &[0.9, 1.91, 2.89, 3.9])]).summary();
    let difference = summary.arms[1].difference.unwrap();
    assert!((difference.mean + 0.1).abs() < 1e-9 && difference.half.unwrap() < 0.02, "{difference:?}");
    assert!(summary.arms[1].metric.unwrap().half.unwrap() > 1.0);
    assert!(summary.arms[0].difference.is_none());
}

#[test]
fn tables_are_the_study_alone_and_quote_what_must_be() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let study = study(rule, &[("base", None, &[1.0, 2.0]), ("r4", Some(4.0), &[1.5])]);
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    report(&study, one.path()).unwrap();
    report(&study, two.path()).unwrap();
    for file in ["results.csv", "table.md"] {
        let read = |dir: &tempfile::TempDir| std::fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(read(&one), read(&two));
        assert!(!read(&one).contains("NaN"));
    }
    let csv = std::fs::read_to_string(one.path().join("results.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 4);
    assert!(lines[0].ends_with("mismatch,model.note,gap"), "{}", lines[0]);
    assert_eq!(lines[3], "r4,0,4,10,1.5,8,3,0.01,\"a, \"\"b\"\"\",1.5");
}

#[test]
fn what_lowkey_did_not_write_is_not_replaced() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let mut study = study(rule, &[("base", None, &[1.0, 2.0]), ("r4", Some(4.0), &[1.5, 2.5])]);
    for name in ["results.csv", "table.md", "report.html"] {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join(name);
        std::fs::write(&own, "# mine\n").unwrap();
        let why = report(&study, dir.path()).unwrap_err().to_string();
        assert!(why.contains(name) && why.contains("no report of lowkey's"), "{why}");
        assert_eq!(std::fs::read_to_string(&own).unwrap(), "# mine\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else was written");
    }
    // Its own it does replace: with a verdict, without one, and of nothing yet.
    let dir = tempfile::tempdir().unwrap();
    report(&study, dir.path()).unwrap();
    study.objections.push("it was a dream".into());
    report(&study, dir.path()).unwrap();
    study.runs.clear();
    report(&study, dir.path()).unwrap();
    report(&study, dir.path()).unwrap();
}

#[test]
fn names_are_neither_markup_nor_formulas() {
    let rule = Rule::Theory { name: "a`<b>`".into(), percent: 5.0, confidence: 0.95 };
    let mut study = study(rule, &[("=cmd()", Some(2.0), &[0.8]), ("*r*", Some(5.0), &[0.5])]);
    study.theory[0].name = "a`<b>`".into();
    study.question = "<script>alert(1)</script> \u{1b}[2J | why?".into();
    let dir = tempfile::tempdir().unwrap();
    report(&study, dir.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let (csv, table, page) = (read("results.csv"), read("table.md"), read("report.html"));
    assert!(csv.lines().nth(1).unwrap().starts_with("'=cmd(),0,"), "{csv}");
    assert!(table.contains("&lt;script&gt;") && table.contains("\\|") && !table.contains("<script"), "{table}");
    assert!(table.contains("| \\*r\\* | 5 |") && table.contains("a\\u0060<b>\\u0060"), "{table}");
    assert!(page.contains("&lt;script&gt;") && !page.contains("<script"));
    for text in [&csv, &table, &page] {
        assert!(!text.contains('\u{1b}'));
    }
}
