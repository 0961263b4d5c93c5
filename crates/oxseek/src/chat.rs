//! `oxseek chat`: a conversation in the terminal.

use std::io::{self, BufRead, Write};

use serde_json::Value;

use crate::{
    args::ChatArgs,
    conversation::{block_on, chat_prompt, describe, message, stream, submit},
    failure::Failure,
    open::{Opened, open_engine},
};

const HELP: &str = "\
/system TEXT   set the system prompt and begin anew
/reset         forget the conversation
/think         turn thinking on or off
/help          show this
/exit          leave (Ctrl-D too); Ctrl-C stops an answer";

/// Talks until the input ends.
pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let opened = open_engine(&args.model, 1, 1)?;
    let mut sampling = args.sampling.clone();
    let mut conversation = Conversation::new(args.system.clone());
    eprintln!("{} is ready. /help shows the commands.", opened.name);
    let mut lines = io::stdin().lock().lines();
    loop {
        eprint!("> ");
        io::stderr().flush()?;
        let Some(line) = lines.next() else { break };
        let line = line?;
        match Input::parse(&line) {
            Input::Empty => {}
            Input::Exit => break,
            Input::Help => eprintln!("{HELP}"),
            Input::Reset => conversation = Conversation::new(conversation.system),
            Input::System(text) => conversation = Conversation::new(Some(text.into())),
            Input::Think => {
                sampling.think = !sampling.think;
                eprintln!("thinking is {}", if sampling.think { "on" } else { "off" });
            }
            Input::Unknown(command) => eprintln!("{command} is no command; /help shows them"),
            Input::Message(text) => {
                if let Err(e) = answer(&opened, &mut conversation, text, &sampling) {
                    match e {
                        Failure::Usage(_) | Failure::Run(_) => eprintln!("{e}"),
                        other => return Err(other),
                    }
                }
            }
        }
    }
    Ok(())
}

fn answer(
    opened: &Opened,
    conversation: &mut Conversation,
    text: &str,
    sampling: &crate::args::SamplingArgs,
) -> Result<(), Failure> {
    let mut messages = conversation.messages();
    messages.push(message("user", text));
    let (prompt, thinking) = chat_prompt(opened, &messages, sampling.think)?;
    let ticket = submit(opened, prompt, sampling)?;
    let (reply, usage) = block_on(stream(ticket, thinking))??;
    if let Some(usage) = usage {
        eprintln!("({})", describe(&usage));
    }
    conversation.turns.push((text.to_string(), without_thinking(&reply, thinking).to_string()));
    Ok(())
}

/// Earlier thinking is not shown to the model again.
fn without_thinking(reply: &str, thinking: bool) -> &str {
    match reply.rsplit_once("</think>") {
        Some((_, answer)) => answer,
        None if thinking => "",
        None => reply,
    }
}

struct Conversation {
    system: Option<String>,
    /// Question and answer.
    turns: Vec<(String, String)>,
}

impl Conversation {
    fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    fn messages(&self) -> Vec<Value> {
        let system = self.system.iter().map(|s| message("system", s));
        let turns = self.turns.iter().flat_map(|(q, a)| [message("user", q), message("assistant", a)]);
        system.chain(turns).collect()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Empty,
    Exit,
    Help,
    Reset,
    Think,
    System(&'a str),
    Unknown(&'a str),
    Message(&'a str),
}

impl<'a> Input<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Self::Empty,
            "/exit" | "/quit" | "/bye" => Self::Exit,
            "/help" | "/?" => Self::Help,
            "/reset" | "/clear" => Self::Reset,
            "/think" => Self::Think,
            "/system" => Self::System(rest.trim()),
            _ if word.starts_with('/') => Self::Unknown(word),
            _ => Self::Message(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_a_slash() {
        assert_eq!(Input::parse("  hi there "), Input::Message("hi there"));
        assert_eq!(Input::parse("/system Be kind."), Input::System("Be kind."));
        assert_eq!(Input::parse("/reset"), Input::Reset);
        assert_eq!(Input::parse("/rest"), Input::Unknown("/rest"));
        assert_eq!(Input::parse(" "), Input::Empty);
    }

    #[test]
    fn thinking_leaves_the_history() {
        assert_eq!(without_thinking("a plan</think>an answer", true), "an answer");
        assert_eq!(without_thinking("cut while plan", true), "");
        assert_eq!(without_thinking("an answer", false), "an answer");
    }
}
