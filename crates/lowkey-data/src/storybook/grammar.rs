//! The grammar: every sentence that a story can hold, and what comes after it.

use super::{
    Class,
    lexicon::{
        Form, Kind,
        Part::{self, Text, Word},
        Setting,
    },
    rule::Rule,
    teller::Teller,
    world::{self, Deed, FEWEST_FACTS, Fact, Question, Subject, World},
};

impl Rule {
    /// Tells it.
    pub(super) fn tell<T: Teller>(self, t: &mut T) {
        match self {
            Rule::Story => open(t),
            Rule::Scene(world) => scene(t, world),
            Rule::Close(world) => close(t, world),
        }
    }
}

/// "One cold day Mira and Tom went to the farm."
fn open(t: &mut impl Teller) {
    t.choose(
        Class::Syntax,
        &[(5, Text("Once ")), (5, Text("One ")), (2, Text("Last ")), (1, Text("Long ago "))],
        |t, i| match i {
            1 => {
                t.vary(
                    Class::Detail,
                    &[(5, "cold "), (4, "warm "), (3, "wet "), (3, "fine "), (2, "dark "), (1, "gray ")],
                );
                t.vary(Class::Detail, &[(5, "day "), (3, "morning "), (2, "evening "), (2, "night ")]);
            }
            2 => t.vary(Class::Detail, &[(3, "night "), (2, "week "), (2, "spring "), (1, "summer "), (1, "winter ")]),
            _ => {}
        },
    );
    let hero = t.draw(Class::Name, Kind::Name, Form::Plain);
    t.choose(Class::Syntax, &[(2, Text(" and ")), (1, Text(" met "))], |t, i| {
        let friend = t.draw(Class::Name, Kind::Name, Form::Plain);
        if i == 0 {
            t.vary(
                Class::Syntax,
                &[(3, " went to the "), (2, " ran to the "), (2, " were at the "), (1, " sat at the ")],
            );
        } else {
            t.text(" at the ");
        }
        t.pick(
            Class::Detail,
            &Setting::ALL.map(|(weight, setting, name)| (weight, Text(name), setting)),
            |t, setting| {
                t.text(".");
                t.expand(Rule::Scene(World::new(setting, [hero, friend])));
            },
        );
    });
}

/// One sentence of the story, and all that comes after it.
fn scene(t: &mut impl Teller, world: World) {
    t.heard(&world.facts);
    t.text(" ");
    let deeds = world.deeds();
    let mut subjects = vec![];
    if !deeds.is_empty() {
        subjects.extend([0, 1].map(|child| (8, Word(world.cast[child], Form::Plain), Subject::Child(child))));
        subjects
            .extend(world.topic.map(|child| (8, Word(world.cast[child], Form::CapitalPronoun), Subject::Child(child))));
    }
    if !world.done.beasts && world.fits(world::BEASTS, 0) {
        subjects.push((2, Text("The "), Subject::Beasts));
    }
    if !world.done.weather && world.fits(world::WEATHER, 0) {
        subjects.push((1, Text("It "), Subject::Weather));
    }
    if world.known() >= FEWEST_FACTS {
        subjects.extend(world.questions().iter().map(|&(weight, part, what)| (weight, part, Subject::Question(what))));
    }
    t.pick(Class::Plot, &subjects, |t, subject| match subject {
        Subject::Child(child) => {
            t.text(" ");
            t.pick(Class::Plot, &deeds, |t, deed| match deed {
                Deed::Hide => hide(t, world, child),
                Deed::Take => take(t, world, child),
                Deed::Own => own(t, world, child),
                Deed::Sing => sing(t, world, child),
                Deed::Count => count(t, world, child),
            });
        }
        Subject::Beasts => {
            beasts(t, world.setting, None, 0);
            t.vary(Class::Detail, &[(4, "happy."), (3, "tired."), (2, "quiet."), (2, "loud."), (1, "sleepy.")]);
            t.expand(Rule::Scene(world.after(world::BEASTS, None, |done| done.beasts = true)));
        }
        Subject::Weather => {
            t.vary(
                Class::Detail,
                &[(4, "rained a lot."), (3, "was windy."), (2, "got dark."), (2, "was very hot."), (1, "snowed.")],
            );
            t.expand(Rule::Scene(world.after(world::WEATHER, None, |done| done.weather = true)));
        }
        Subject::Question(question) => ask(t, world, question),
    });
}

/// "[Mira hid ]a brass key under the cart."
fn hide(t: &mut impl Teller, mut world: World, child: usize) {
    let adjective = t.draw(Class::Fact, Kind::Adjective, Form::Indefinite);
    t.text(" ");
    let noun = t.draw(Class::Fact, Kind::Noun, Form::Plain);
    t.text(" ");
    let place = t.draw(Class::Fact, Kind::Place(world.setting), Form::Plain);
    t.text(".");
    let known = world.known();
    world.facts[known] = Some(Fact { who: world.cast[child], adjective, noun, place });
    t.expand(Rule::Scene(world.after(world::HIDE, Some(child), |_| {})));
}

/// "[Tom took the ]key and hid it in the barn.": the last write wins.
fn take(t: &mut impl Teller, world: World, child: usize) {
    let facts: Vec<_> = world.facts.into_iter().flatten().enumerate().collect();
    let nouns: Vec<_> = facts.iter().map(|&(i, fact)| (1, Word(fact.noun, Form::Plain), (i, fact))).collect();
    t.pick(Class::Plot, &nouns, |t, (i, fact)| {
        t.text(" and hid it ");
        let place = t.draw(Class::Fact, Kind::Place(world.setting), Form::Plain);
        t.text(".");
        let mut world = world.after(world::TAKE, Some(child), |done| done.take = true);
        world.facts[i] = Some(Fact { who: world.cast[child], place, ..fact });
        t.expand(Rule::Scene(world));
    });
}

/// "[Mira had ]five plums and found two more, so she had seven."
fn own(t: &mut impl Teller, world: World, child: usize) {
    let many = t.draw(Class::Fact, Kind::Many, Form::Plain);
    t.text(" ");
    t.draw(Class::Detail, Kind::Fruit, Form::Plain);
    t.choose(Class::Syntax, &[(1, Text(" and found ")), (1, Text(" and gave "))], |t, i| {
        if i == 1 {
            t.say(Class::Repeat, Word(world.cast[1 - child], Form::Plain));
            t.text(" ");
        }
        let some = t.draw(Class::Fact, Kind::Some, Form::Plain);
        t.text(if i == 0 { " more, so " } else { ", so " });
        t.say(Class::Agreement, Word(world.cast[child], Form::Pronoun));
        t.text(" had ");
        t.say(Class::Arithmetic, if i == 0 { Part::Sum(many, some) } else { Part::Difference(many, some) });
        t.text(if i == 0 { "." } else { " left." });
    });
    t.expand(Rule::Scene(world.after(world::OWN, Some(child), |done| done.own = true)));
}

/// `[Mira sang, "]Hop, shy frog, hop!" Tom sang, "Hop, shy frog, hop!"`
fn sing(t: &mut impl Teller, world: World, child: usize) {
    let call = t.draw(Class::Detail, Kind::Call, Form::Capital);
    t.text(", ");
    let mood = t.draw(Class::Detail, Kind::Mood, Form::Plain);
    t.text(" ");
    let animal = t.draw(Class::Detail, Kind::Animal(world.setting), Form::Plain);
    t.text(", ");
    t.say(Class::Repeat, Word(call, Form::Plain));
    t.text("!\" ");
    t.say(Class::Repeat, Word(world.cast[1 - child], Form::Plain));
    t.text(" sang, \"");
    let line = [Word(call, Form::Capital), Text(", "), Word(mood, Form::Plain), Text(" "), Word(animal, Form::Plain)];
    for part in line.into_iter().chain([Text(", "), Word(call, Form::Plain)]) {
        t.say(Class::Repeat, part);
    }
    t.text("!\"");
    t.expand(Rule::Scene(world.after(world::SING, Some(1 - child), |done| done.sing = true)));
}

/// "[Mira saw ]four hens: one, two, three, four."
fn count(t: &mut impl Teller, world: World, child: usize) {
    let few = t.draw(Class::Fact, Kind::Few, Form::Plain);
    t.text(" ");
    t.draw(Class::Detail, Kind::Animal(world.setting), Form::Plain);
    t.text("s: ");
    t.say(Class::Arithmetic, Part::Count(few));
    t.text(".");
    t.expand(Rule::Scene(world.after(world::COUNT, Some(child), |done| done.count = true)));
}

/// "[The ]hens that saw the goat were ": a noun phrase with up to two relative clauses, one inside the other, and the
/// verb that agrees with its outermost noun.
fn beasts<T: Teller>(t: &mut T, setting: Setting, verb: Option<&'static str>, depth: usize) {
    t.draw(Class::Detail, Kind::Animal(setting), Form::Plain);
    t.choose(Class::Syntax, &[(1, Text(" ")), (1, Text("s "))], |t, number| {
        let verb = verb.unwrap_or(["as ", "ere "][number]);
        if depth == 2 {
            t.say(Class::Agreement, Text("w"));
            t.say(Class::Agreement, Text(verb));
            return;
        }
        // The choice is between a clause and a verb; which verb is not a choice but agreement.
        t.choose(Class::Syntax, &[(1, Text("w")), (1, Text("that "))], |t, clause| {
            if clause == 0 {
                t.say(Class::Agreement, Text(verb));
            } else {
                t.vary(Class::Syntax, &[(2, "saw the "), (1, "met the "), (1, "led the ")]);
                beasts(t, setting, Some(verb), depth + 1);
            }
        });
    });
}

/// "[Where was the ]key? In the barn."
fn ask(t: &mut impl Teller, world: World, question: Question) {
    let facts: Vec<_> = world.facts.into_iter().enumerate().filter_map(|(i, fact)| Some((i, fact?))).collect();
    let keys: Vec<_> = facts
        .iter()
        .map(|&(i, fact)| {
            let key = if matches!(question, Question::What) { fact.place } else { fact.noun };
            (1, Word(key, Form::Plain), (i, fact))
        })
        .collect();
    t.pick(Class::Plot, &keys, |t, (i, fact)| {
        let length = match question {
            Question::Where => {
                t.text("? ");
                t.say(Class::Answer, Word(fact.place, Form::Capital));
                world::WHERE
            }
            Question::Who => {
                t.text(" last? ");
                t.say(Class::Answer, Word(fact.who, Form::Plain));
                world::WHO
            }
            Question::What => {
                t.text("? The ");
                t.say(Class::Answer, Word(fact.adjective, Form::Plain));
                t.say(Class::Answer, Text(" "));
                t.say(Class::Answer, Word(fact.noun, Form::Plain));
                world::WHAT
            }
        };
        t.text(".");
        let mut world = world.after(length, None, |_| {});
        world.facts[i] = None;
        t.expand(Rule::Close(world));
    });
}

/// Another question about what has not been asked yet, or the end.
fn close(t: &mut impl Teller, world: World) {
    let questions = world.questions();
    if world.known() == 0 || questions.is_empty() {
        return t.say(Class::End, Part::End);
    }
    t.choose(Class::Plot, &[(1, Part::End), (3, Text(" "))], |t, i| {
        if i == 1 {
            t.pick(Class::Plot, &questions, |t, question| ask(t, world, question));
        }
    });
}
