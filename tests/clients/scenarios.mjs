// Runs one of a script's scenarios, and prints its result as JSON: node SCRIPT SCENARIO ADDRESS.
export const weather = {
  name: "get_weather",
  description: "The weather of a city.",
  parameters: {
    type: "object",
    properties: { city: { type: "string" }, days: { type: "integer" } },
    required: ["city"],
  },
};

export const question = "Make a JSON object: Simon is 59 years old and lives in Rome.";
export const person = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" }, city: { type: "string" } },
  required: ["name", "age", "city"],
  additionalProperties: false,
};

export async function run(scenarios) {
  const [name, address] = process.argv.slice(2);
  console.log(JSON.stringify(await scenarios[name](address)));
}
