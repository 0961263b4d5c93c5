//! `oxseek run`: one prompt, one answer.

use std::io::{IsTerminal, Read};

use crate::{
    args::RunArgs,
    conversation::{block_on, chat_prompt, describe, message, stream, submit, text_prompt},
    failure::Failure,
    open::open_engine,
};

/// Largest prompt that is read from standard input.
const PROMPT_BYTES_MAX: u64 = 64 << 20;

/// Answers one prompt on the terminal.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let prompt = match args.prompt.as_deref() {
        Some("-") | None => prompt_from_stdin()?,
        Some(text) => text.to_string(),
    };
    if prompt.trim().is_empty() {
        return Err(Failure::Usage("the prompt is empty: `oxseek run \"Tell me a story\"`".into()));
    }
    let opened = open_engine(&args.model, 1, 1)?;
    let (tokens, thinking) = if args.raw || opened.template.is_none() {
        (text_prompt(&opened, &prompt)?, false)
    } else {
        let mut messages = Vec::new();
        messages.extend(args.system.as_deref().map(|s| message("system", s)));
        messages.push(message("user", &prompt));
        chat_prompt(&opened, &messages, args.sampling.think)?
    };
    let ticket = submit(&opened, tokens, &args.sampling)?;
    let (_, usage) = block_on(stream(ticket, thinking))??;
    match usage {
        None => Err(Failure::Interrupted),
        Some(usage) => {
            if args.stats {
                eprintln!("{}", describe(&usage));
            }
            Ok(())
        }
    }
}

fn prompt_from_stdin() -> Result<String, Failure> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        eprintln!("Type a prompt and end it with Ctrl-D:");
    }
    let mut bytes = Vec::new();
    stdin.lock().take(PROMPT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return Err(Failure::Usage(format!("the prompt is over {} MiB", PROMPT_BYTES_MAX >> 20)));
    }
    String::from_utf8(bytes).map_err(|e| Failure::Usage(format!("the prompt is not UTF-8: {e}")))
}
