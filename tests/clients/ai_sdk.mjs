// Vercel's AI SDK: text, a stream, a tool, an object; prints what it got as one line of JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [, , baseURL, name] = process.argv;
const provider = createOpenAICompatible({
  name: "lowlat", baseURL, apiKey: "none", supportsStructuredOutputs: true,
});
const model = provider(name);
const options = { model, maxRetries: 0 };

const text = await generateText({ ...options, prompt: "text" });
const stream = streamText({ ...options, prompt: "stream" });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
const weather = tool({
  description: "Weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `Rain in ${city}`,
});
const called = await generateText({
  ...options, prompt: "tool", tools: { weather }, stopWhen: stepCountIs(3),
});
const schema = z.object({ isGood: z.boolean() });
const object = await generateText({ ...options, prompt: "object", output: Output.object({ schema }) });
console.log(JSON.stringify({
  text: text.text, usage: text.usage.outputTokens, streamed, called: called.text,
  steps: called.steps.length, object: object.output,
}));
